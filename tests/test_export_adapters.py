"""Converted adapters give the same outputs in other tools, and convert back bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_writers import read_tensors
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shrunken_models import shrunken_config, shrunken_model
from stock_peft import stock_logits
from tiny_models import logits, randomize_adapter, tiny_model, token_ids

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.cli import main
from peft_moe_qlora.layouts import convert_adapter, read_adapter


def save_adapter(directory, model_type: str = "qwen3_moe", **options):
    """Saves base and adapter, in fp32 for a close comparison of logits; returns the unmerged logits."""
    if model_type == "llama4_text":
        model = llama4()
    elif model_type in ("laguna", "nemotron_h"):
        model = shrunken_model(model_type, dtype=torch.float32)
    else:
        model = tiny_model(model_type)
    model.save_pretrained(directory / "base")
    model.name_or_path = str(directory / "base")
    config = MoeQLoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "quant_type": None, **options})
    model = get_peft_model(model, config).eval()
    randomize_adapter(model)
    model.save_pretrained(directory / "adapter")
    return logits(model, token_ids())


def llama4():
    torch.manual_seed(0)
    return transformers.Llama4ForCausalLM(shrunken_config("llama4_text")).eval()


def assert_stock_peft_gives(live: torch.Tensor, directory: Path) -> None:
    found = stock_logits(directory / "base", token_ids(), directory / "converted")
    torch.testing.assert_close(found, live, rtol=0, atol=1e-5 * live.abs().max().item())


OPTIONS = {
    "one rank": {},
    "experts of another rank": {"expert_r": 2, "expert_alpha": 5},
    "rslora": {"use_rslora": True, "expert_r": 3},
    "patterns": {
        "rank_pattern": {"layers.1.mlp.experts.down_proj": 3, "q_proj": 2},
        "alpha_pattern": {"layers.1.mlp.experts.*": 3, "layers.0.self_attn.q_proj": 9},
    },
    "patterns on layers that look like experts": {
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"(up|gate)_proj": 9, "self_attn.*": 3},
    },
    "one projection": {"target_modules": ["experts.down_proj", "o_proj"]},
    "the first projection": {"target_modules": ["gate_up_proj"]},
    "experts alone": {"target_modules": ["experts"]},
}


@pytest.mark.parametrize(
    ("model_type", "options"),
    # all options combined with dense layers and shared experts
    [("deepseek_v3", name) for name in OPTIONS]
    + [(model_type, name) for model_type in ("qwen3_moe", "mixtral", "gpt_oss") for name in ("one rank", "patterns")],
)
def test_stock_peft_gives_the_same_logits(model_type, options, tmp_path):
    live = save_adapter(tmp_path, model_type, **OPTIONS[options])
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "peft-lora")
    assert json.loads((tmp_path / "converted" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert_stock_peft_gives(live, tmp_path)


def assert_base_is_required(directory, match: str) -> None:
    """The adapter has no usable base name; the model type alone would be enough."""
    (directory / "base").rename(directory / "gone")
    convert_adapter(directory / "adapter", directory / "by type", "peft-lora")
    file = directory / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base": None}))
    with pytest.raises(ValueError, match=match):
        convert_adapter(directory / "adapter", directory / "again", "peft-lora")
    with pytest.raises(ValueError, match=r"config\.json of the base model .*nowhere was not found"):
        convert_adapter(directory / "adapter", directory / "again", "peft-lora", base=directory / "nowhere")


def test_llama_4_layout_matches_peft(tmp_path):
    live = save_adapter(tmp_path, "llama4_text")
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "peft-lora")
    assert_stock_peft_gives(live, tmp_path)
    assert_base_is_required(tmp_path, "may belong to Llama 4")


def test_shared_experts_of_laguna_reach_stock_peft(tmp_path):
    """PEFT renames their keys by a pattern that does not fit the model's names."""
    live = save_adapter(tmp_path, "laguna")
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "peft-lora")
    assert_stock_peft_gives(live, tmp_path)
    found = read_adapter(tmp_path / "converted", tmp_path / "base")
    own = read_adapter(tmp_path / "adapter", tmp_path / "base").non_expert
    assert found.non_expert.keys() == own.keys()
    assert all(torch.equal(found.non_expert[key], own[key]) for key in own)
    assert_base_is_required(tmp_path, "may belong to Laguna")


def test_layers_that_stock_peft_rejects_are_not_adapted(tmp_path):
    """PEFT rejects LoRA on NemotronH's out_proj, which a kernel bypasses; "all-linear" excludes it here too."""
    live = save_adapter(tmp_path, "nemotron_h", target_modules="all-linear")
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "peft-lora")
    assert_stock_peft_gives(live, tmp_path)


@pytest.mark.parametrize("target", ["peft-lora", "per-expert"])
def test_missing_layer(target, tmp_path):
    save_adapter(tmp_path, target_modules=["experts"], layers_to_transform=[1])
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", target)
    save_adapter(tmp_path, target_modules=["experts"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "layers.1." not in key}, file)
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.experts\.gate_up_proj.lora_A.weight"):
        convert_adapter(tmp_path / "adapter", tmp_path / "again", target)


def test_adapter_of_another_base(tmp_path):
    save_adapter(tmp_path)
    tiny_model("qwen3_moe", num_experts=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has shape \(8, 4, 64\) .* Expected \(4, 4, 64\)"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", "peft-lora", base=tmp_path / "other")


def merged_by_hand(directory) -> dict[str, torch.Tensor]:
    """The base's checkpoint plus a per-expert adapter, matched by names only."""
    weights = read_tensors(directory / "base")
    factors = load_file(directory / "converted" / "adapter_model.safetensors")
    config = json.loads((directory / "converted" / "adapter_config.json").read_text())
    used = set()
    for key in [key for key in factors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        B = factors[key.replace("lora_A", "lora_B")]
        assert factors[key].shape[0] == B.shape[1] == config["r"]
        weights[name] = weights[name] + config["lora_alpha"] / config["r"] * (B @ factors[key])
        used |= {key, key.replace("lora_A", "lora_B")}
    assert used == factors.keys()
    return weights


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_per_expert_factors_match_checkpoint_tensors(model_type, options, tmp_path):
    """Added to the tensors of the same names, they give the same model as the unmerged adapter."""
    live = save_adapter(tmp_path, model_type, **options)
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "per-expert")
    save_file(merged_by_hand(tmp_path), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, token_ids()), live, rtol=0, atol=2e-5 * live.abs().max().item())


def test_interleaved_rows_are_separated(tmp_path):
    save_adapter(tmp_path, "gpt_oss", target_modules=["experts"])
    found = convert_adapter(tmp_path / "adapter", tmp_path / "converted", "per-expert")
    factors = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    gate_up = next(one for one in found.experts if one.name == "model.layers.1.mlp.experts.gate_up_proj")
    prefix = "base_model.model.model.layers.1.mlp.experts.2"
    assert torch.equal(factors[f"{prefix}.gate_proj.lora_B.weight"], gate_up.B[2, ::2])
    assert torch.equal(factors[f"{prefix}.up_proj.lora_B.weight"], gate_up.B[2, 1::2])
    assert torch.equal(factors[f"{prefix}.up_proj.lora_A.weight"], gate_up.A[2])


@pytest.mark.parametrize("target", ["peft-lora", "per-expert"])
def test_command(target, tmp_path):
    save_adapter(tmp_path)
    command = ["convert", str(tmp_path / "adapter"), str(tmp_path / "converted"), "--to", target]
    assert main(command) == 0
    assert {file.name for file in (tmp_path / "converted").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert main(command) == 1  # no longer empty


def test_linear_layers_have_checkpoint_names(tmp_path):
    model = shrunken_model("hy_v3", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, MoeQLoraConfig(r=2, quant_type=None, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "per-expert", tmp_path / "base")
    names = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        for key in load_file(tmp_path / "converted" / "adapter_model.safetensors")
        if key.endswith("lora_A.weight")
    }
    assert any("shared" in name for name in names)
    assert names <= read_tensors(tmp_path / "base").keys()


def test_embeddings_and_modules_trained_in_full(tmp_path):
    live = save_adapter(tmp_path, target_modules=["experts", "embed_tokens"], modules_to_save=["norm"])
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "peft-lora")
    assert_stock_peft_gives(live, tmp_path)
    with pytest.raises(ValueError, match="readers of this layout do not support"):
        convert_adapter(tmp_path / "adapter", tmp_path / "again", "per-expert")


def test_trained_tokens_are_rejected(tmp_path):
    save_adapter(tmp_path, target_modules=["experts"], trainable_token_indices=[4, 5])
    with pytest.raises(ValueError, match="trainable_tokens_delta, which PEFT's LoRA on parameters does not support"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", "peft-lora")


def test_adapter_without_experts_is_left_to_peft(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not name its base"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match="contains no factors of experts"):
        read_adapter(tmp_path, tmp_path / "base")


def test_adapters_that_cannot_be_converted(tmp_path):
    with pytest.raises(ValueError, match=r"contains no adapter_config\.json"):
        read_adapter(tmp_path)
    save_adapter(tmp_path)
    adapter, out = tmp_path / "adapter", tmp_path / "converted"
    with pytest.raises(ValueError, match="target='vlmm' is unknown"):
        convert_adapter(adapter, out, "vlmm")
    with pytest.raises(ValueError, match=r"config\.json of the base model .* was not found"):
        convert_adapter(adapter, out, "per-expert", base=tmp_path / "nowhere")
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has no experts module model\.layers\.0\.mlp\.experts"):
        convert_adapter(adapter, out, "per-expert", base=tmp_path / "other")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.experts.down_proj.lora_A.weight"
    save_file({name: t for name, t in tensors.items() if name != key}, file)
    with pytest.raises(ValueError, match=r"lora_B of .*down_proj without its other factor"):
        convert_adapter(adapter, out, "peft-lora")
    lonely = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({name: t for name, t in tensors.items() if name != lonely}, file)
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight, but not .*q_proj\.lora_B\.weight"):
        convert_adapter(adapter, out, "per-expert")
    save_file({**tensors, key: tensors[key].transpose(1, 2).contiguous()}, file)
    with pytest.raises(ValueError, match=r"lora_A and lora_B of .*down_proj have shapes .* Expected \(E, r, in\)"):
        convert_adapter(adapter, out, "peft-lora")
    save_file({**tensors, key: tensors[key] * float("nan")}, file)
    with pytest.raises(ValueError, match=r"down_proj\.lora_A\.weight contains values that are not finite"):
        convert_adapter(adapter, out, "peft-lora")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        convert_adapter(adapter, out, "peft-lora")
    assert not out.exists()


def test_rank_that_differs_from_the_config(tmp_path):
    """Of a linear layer: its scaling would differ."""
    save_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(ValueError, match=r"q_proj have rank 4, but the config, .* has rank 2"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", "moe-qlora")


def test_missing_module_trained_in_full(tmp_path):
    save_adapter(tmp_path, target_modules=["experts"], modules_to_save=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "lm_head" not in key}, file)
    with pytest.raises(ValueError, match="contains no tensor of lm_head"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", "moe-qlora")
