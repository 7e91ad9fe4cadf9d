"""Adapters of others say here what they said there, come back bit for bit, and bad ones are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from stock_peft import VERSIONS, run_stock_peft
from test_export_adapters import llama4
from tiny_models import logits, tiny_model, token_ids

from peft_moe_qlora.export import ReadOptions, convert_adapter

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PLAIN = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"], "target_parameters": BOTH}
STACKS = 4
"""Of a tiny model: two layers, two projections."""

CASES = {
    "one rank": ("qwen3_moe", {}, PLAIN),
    "patterns and rslora": (
        "qwen3_moe",
        {},
        {
            **PLAIN,
            "use_rslora": True,
            "rank_pattern": {".*experts.down_proj": 2, "layers.1.self_attn.q_proj": 4},
            "alpha_pattern": {"layers.0.mlp.experts.gate_up_proj": 2, "o_proj": 7},
        },
    ),
    "stored (in, out)": ("gpt_oss", {}, PLAIN),
    "one square projection": (
        "qwen3_moe",
        {"moe_intermediate_size": 64},
        {**PLAIN, "target_parameters": ["layers.1.mlp.experts.down_proj"]},
    ),
    "both, one of them square": ("qwen3_moe", {"moe_intermediate_size": 64}, {**PLAIN, "target_modules": []}),
    "modules trained in full": ("qwen3_moe", {}, {**PLAIN, "modules_to_save": ["norm"]}),
    "declares nothing": (
        "llama4_text",
        {},
        {**PLAIN, "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]},
    ),
}


def save_base(directory: Path, model_type: str, **sizes) -> None:
    model = llama4() if model_type == "llama4_text" else tiny_model(model_type, **sizes)
    model.save_pretrained(directory)


@pytest.fixture(scope="module", params=VERSIONS)
def of_stock_peft(request, tmp_path_factory):
    """Name of a case -> directory with a base, an adapter, and logits, all made by that PEFT in one process."""
    root = tmp_path_factory.mktemp("stock")
    jobs, found = [], {}
    for number, (name, (model_type, sizes, options)) in enumerate(CASES.items()):
        directory = root / str(number)
        save_base(directory / "base", model_type, **sizes)
        jobs.append(job(directory, options))
        found[name] = directory
    run_stock_peft(jobs, root, request.param)
    for directory in found.values():
        assert torch.load(directory / "logits.pt")[0] == request.param
        assert json.loads((directory / "adapter/adapter_config.json").read_text())["peft_version"] == request.param
    return found


def job(directory: Path, options: dict | None = None, adapter: str = "adapter") -> dict:
    found = {
        "base": str(directory / "base"),
        "adapter": str(directory / adapter),
        "ids": token_ids().tolist(),
        "logits": str(directory / "logits.pt"),
    }
    return found if options is None else {**found, "options": options}


def stock(directory: Path, **options) -> Path:
    """An adapter of the installed PEFT with its logits."""
    save_base(directory / "base", "qwen3_moe")
    run_stock_peft([job(directory, {**PLAIN, **options})], directory)
    return directory


def logits_here(directory: Path, options: ReadOptions | None = None, adapter: str = "adapter") -> torch.Tensor:
    """Of the adapter, read from whatever layout and loaded by this package onto 16-bit experts."""
    converted = directory / f"{adapter}-here"
    options = options or ReadOptions(quant_type="none")
    convert_adapter(directory / adapter, converted, "moe-qlora", directory / "base", options)
    return loaded_here(directory, converted)


def loaded_here(directory: Path, adapter: Path) -> torch.Tensor:
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, adapter).eval()
    assert {f"{key}" for key in saved_keys(model)} == load_file(adapter / "adapter_model.safetensors").keys()
    return logits(model, token_ids())


def saved_keys(model: PeftModel) -> set[str]:
    from peft import get_peft_model_state_dict

    return set(get_peft_model_state_dict(model))


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def tensors_of(directory: Path, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(directory / name)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("case", CASES)
def test_stock_pefts_adapters_say_the_same_here(of_stock_peft, case):
    directory = of_stock_peft[case]
    version, expected = torch.load(directory / "logits.pt")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
    assert (logits(base, token_ids()) - expected).abs().max() > 0.01 * expected.abs().max()
    assert_same_logits(logits_here(directory), expected)
    # and back: what was laid out as today's PEFT does it comes back with every bit and every key
    convert_adapter(directory / "adapter-here", directory / "back", "peft-lora", directory / "base")
    if version in ("0.19.1", VERSIONS[-1]):
        assert_same_tensors(tensors_of(directory / "back"), tensors_of(directory / "adapter"))
    again = convert_adapter(directory / "back", directory / "again", "moe-qlora", directory / "base")
    assert_same_tensors(tensors_of(directory / "again"), tensors_of(directory / "adapter-here"))
    assert again.config.quant_type == "nf4"
    # deleted, since the fixture's directories are shared
    for name in ("adapter-here", "back", "again"):
        shutil.rmtree(directory / name)
