"""Adapters of other tools give the same outputs here, round-trip bit by bit, and are rejected by name if damaged."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from adapters_of_others import ALPHA, PREFIX, WRITERS, R, random_factors, write_mlx, write_per_expert, write_stacked
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from shrunken_models import shrunken_model
from stock_peft import VERSIONS, run_stock_peft
from test_export_adapters import OPTIONS, llama4, save_adapter
from tiny_models import logits, tiny_model, token_ids

from peft_moe_qlora.layouts import TARGETS, AdapterFile, ReadOptions, convert_adapter, read_adapter
from peft_moe_qlora.layouts.adapter_file import rank_and_alpha
from peft_moe_qlora.layouts.non_expert import adapted_layers

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
    """Name of a case -> directory with a base, an adapter and logits, all made by that PEFT version in one process."""
    root = tmp_path_factory.mktemp("stock")
    jobs, found = [], {}
    for number, (name, (model_type, sizes, options)) in enumerate(CASES.items()):
        directory = root / str(number)
        save_base(directory / "base", model_type, **sizes)
        jobs.append(job(directory, options))
        found[name] = directory
    run_stock_peft(jobs, request.param)
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
    directory.mkdir(exist_ok=True)
    save_base(directory / "base", "qwen3_moe")
    run_stock_peft([job(directory, {**PLAIN, **options})])
    return directory


def in_16_bits(adapter: Path) -> ReadOptions:
    """Sets 16-bit experts in the config of another tool's adapter; this package's configs contain the storage."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return ReadOptions(quant_type=None if config.get("peft_type") == "MOE_QLORA" else "none")


def logits_here(directory: Path, options: ReadOptions | None = None, adapter: str = "adapter") -> torch.Tensor:
    """Logits of the adapter, read from any layout and loaded by this package onto 16-bit experts."""
    converted = directory / f"{adapter}-here"
    options = options or in_16_bits(directory / adapter)
    convert_adapter(directory / adapter, converted, "moe-qlora", directory / "base", options)
    return loaded_here(directory, converted)


def loaded_here(directory: Path, adapter: Path) -> torch.Tensor:
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, adapter).eval()
    assert get_peft_model_state_dict(model).keys() == tensors_of(adapter).keys()
    return logits(model, token_ids())


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def tensors_of(directory: Path, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(directory / name)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_adapters_give_the_same_logits(of_stock_peft, case):
    directory = of_stock_peft[case]
    version, expected = torch.load(directory / "logits.pt")
    warnings.filterwarnings("error", ".*ignoring unknown options")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
    assert (logits(base, token_ids()) - expected).abs().max() > 0.01 * expected.abs().max()
    assert_same_logits(logits_here(directory), expected)
    # round trip: a file in the current PEFT layout converts back with every bit and every key
    convert_adapter(directory / "adapter-here", directory / "back", "peft-lora", directory / "base")
    if version in ("0.19.1", VERSIONS[-1]):
        assert_same_tensors(tensors_of(directory / "back"), tensors_of(directory / "adapter"))
    again = convert_adapter(directory / "back", directory / "again", "moe-qlora", directory / "base")
    assert_same_tensors(tensors_of(directory / "again"), tensors_of(directory / "adapter-here"))
    assert again.config.quant_type == "nf4"
    # deleted, since the fixture's directories are shared
    for name in ("adapter-here", "back", "again"):
        shutil.rmtree(directory / name)


def assert_same_adapter(found: AdapterFile, expected: AdapterFile) -> None:
    """The same bits and scalings; the configs may express them differently."""

    def all_of(adapter: AdapterFile) -> dict[str, torch.Tensor]:
        factors = {f"{one.name}.{factor}": getattr(one, factor) for one in adapter.experts for factor in "AB"}
        return {**adapter.non_expert, **factors}

    assert_same_tensors(all_of(found), all_of(expected))
    assert [one.scaling for one in found.experts] == [one.scaling for one in expected.experts]
    for name in adapted_layers(expected.non_expert):
        scalings = [one.config.scaling(*rank_and_alpha(one.config, name)) for one in (found, expected)]
        assert scalings[0] == scalings[1]


def test_embeddings_and_trained_tokens(tmp_path):
    for number, options in enumerate(
        [{"target_modules": ["embed_tokens", "q_proj"]}, {"trainable_token_indices": [4, 5]}]
    ):
        directory = stock(tmp_path / str(number), **options)
        assert_same_logits(logits_here(directory), torch.load(directory / "logits.pt")[1])


@pytest.mark.parametrize("target", ["moe-qlora", "peft-lora", "per-expert"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_own_adapters_round_trip(model_type, target, tmp_path):
    live = save_adapter(tmp_path, model_type)
    written = convert_adapter(tmp_path / "adapter", tmp_path / "written", target)
    found = read_adapter(tmp_path / "written", tmp_path / "base", in_16_bits(tmp_path / "written"))
    assert_same_adapter(found, written)
    assert_same_logits(logits_here(tmp_path, adapter="written"), live)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_round_trip(bias, tmp_path):
    save_adapter(tmp_path, "gpt_oss", bias=bias)
    convert_adapter(tmp_path / "adapter", tmp_path / "again", "moe-qlora")
    found = tensors_of(tmp_path / "again")
    assert any(key.endswith("down_proj_bias") for key in found)
    assert_same_tensors(found, tensors_of(tmp_path / "adapter"))


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_round_trips(target, tmp_path):
    live = save_adapter(tmp_path, target_modules=["experts", "q_proj", "k_proj", "v_proj"])
    written = convert_adapter(tmp_path / "adapter", tmp_path / "written", target)
    assert_same_adapter(read_adapter(tmp_path / "written", tmp_path / "base"), written)
    assert_same_logits(logits_here(tmp_path, adapter="written"), live)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_round_trips_through_the_peft_layout(options, tmp_path):
    live = save_adapter(tmp_path, "deepseek_v3", **options)
    written = convert_adapter(tmp_path / "adapter", tmp_path / "written", "peft-lora")
    assert_same_adapter(read_adapter(tmp_path / "written", tmp_path / "base"), written)
    assert_same_logits(logits_here(tmp_path, adapter="written"), live)


@pytest.mark.parametrize(("model_type", "old"), [("qwen3_moe", None), ("mixtral", "block_sparse_moe.experts")])
def test_per_expert_factors_match_stock_peft(model_type, old, tmp_path):
    """Gate and up have separate A factors, so fusing doubles the rank, as in PEFT."""
    save_base(tmp_path / "base", model_type)
    experts, linear = random_factors(num_experts=4 if old else 8)
    write_per_expert(tmp_path / "adapter", tmp_path / "base", experts, linear, old)
    run_stock_peft([{**job(tmp_path), "resaved": str(tmp_path / "resaved")}])
    expected = torch.load(tmp_path / "logits.pt")[1]
    assert_same_logits(logits_here(tmp_path), expected)
    found = read_adapter(tmp_path / "adapter")
    assert [one.r for one in found.experts] == [2 * R, R] * 2
    # PEFT fused the factors, with the doubled rank in a pattern
    assert_same_logits(logits_here(tmp_path, adapter="resaved"), expected)
    if old:
        # the same under the current names
        write_per_expert(tmp_path / "today", tmp_path / "base", experts, linear)
        assert_same_adapter(read_adapter(tmp_path / "today"), found)


@pytest.mark.parametrize("shared", [True, False], ids=["one A of gate and up", "one A each"])
def test_engine_layouts_contain_the_same_adapter(shared, tmp_path):
    save_base(tmp_path / "base", "qwen3_moe")
    experts, linear = random_factors(shared=shared)
    found = {}
    for name, write in WRITERS.items():
        if shared or name != "stacked, fused":
            write(tmp_path / name, tmp_path / "base", experts, linear)
            found[name] = read_adapter(tmp_path / name)
            assert_same_adapter(found[name], found["per-expert"])
    first = found["per-expert"].experts[0]
    assert (first.r, first.scaling) == (R if shared else 2 * R, ALPHA / R)
    delta = torch.cat([B @ A for A, B in (experts[0, "gate"], experts[0, "up"])], dim=1)
    torch.testing.assert_close(first.B @ first.A, delta)


def test_gate_and_up_rows_follow_the_models_order(tmp_path):
    """gpt-oss interleaves them; stacked files have the gate rows first."""
    save_base(tmp_path / "base", "gpt_oss")
    experts, linear = random_factors(width=64, num_experts=4, shared=True)
    for name, write in WRITERS.items():
        write(tmp_path / name, tmp_path / "base", experts, linear)
        B = read_adapter(tmp_path / name).experts[0].B
        assert torch.equal(B[:, ::2], experts[0, "gate"][1])
        assert torch.equal(B[:, 1::2], experts[0, "up"][1])


def test_mlx_counts_layers_from_the_end(tmp_path):
    save_base(tmp_path / "base", "qwen3_moe")
    experts, linear = random_factors()
    experts = {at: pair for at, pair in experts.items() if at[0] == 1}
    linear = {key: tensor for key, tensor in linear.items() if ".1." in key}
    write_mlx(tmp_path / "adapter", tmp_path / "base", experts, linear, num_layers=1)
    assert {one.path for one in read_adapter(tmp_path / "adapter").experts} == {"model.layers.1.mlp.experts"}
    write_mlx(tmp_path / "all", tmp_path / "base", experts, linear, num_layers=-1)
    with pytest.raises(ValueError, match=r"no factors of model\.layers\.0\.mlp\.experts\.gate_proj and 2 more"):
        read_adapter(tmp_path / "all")


def edit_config(directory: Path, **options) -> None:
    """Sets options of an adapter's config; None removes one."""
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text()) | options
    removed = {name for name, value in options.items() if value is None}
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in removed}))


def edit_tensors(directory: Path, changed: dict[str, torch.Tensor | None], name="adapter_model.safetensors") -> None:
    """Sets tensors of an adapter by the suffix of their key; None removes one."""
    tensors = tensors_of(directory, name)
    for end, tensor in changed.items():
        keys = [key for key in tensors if key.endswith(end)] or [end]
        for key in keys:
            tensors.pop(key, None)
            if tensor is not None:
                tensors[key] = tensor.contiguous().clone()
    save_file(tensors, directory / name, {"format": "pt"})


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_kept_when_the_rank_doubles(use_rslora, tmp_path):
    save_base(tmp_path / "base", "qwen3_moe")
    experts, linear = random_factors()
    write_stacked(tmp_path / "adapter", tmp_path / "base", experts, linear)
    edit_config(tmp_path / "adapter", use_rslora=use_rslora)
    scaling = ALPHA / (R**0.5 if use_rslora else R)
    found = read_adapter(tmp_path / "adapter").experts
    assert [one.r for one in found] == [2 * R, R] * 2
    assert [one.scaling for one in found] == pytest.approx([scaling] * 4, rel=1e-12)


def test_adapter_of_some_of_many_layers(tmp_path):
    """PEFT shortens long lists of targets; unadapted layers stay unadapted, also after saving again."""
    sizes = {"num_hidden_layers": 14}
    save_base(tmp_path / "base", "qwen3_moe", **sizes)
    experts, linear = random_factors(num_layers=12)
    write_stacked(tmp_path / "adapter", tmp_path / "base", experts, linear)
    options = ReadOptions(quant_type="none", partial=True)
    first = logits_here(tmp_path, options)
    assert len(read_adapter(tmp_path / "adapter-here").config.target_modules) == 36
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter-here")
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "adapter-here"))
    assert torch.equal(loaded_here(tmp_path, tmp_path / "saved"), first)
    assert_same_adapter(read_adapter(tmp_path / "saved"), read_adapter(tmp_path / "adapter-here"))


class TestCheckpointNames:
    """hy_v3's checkpoint has shared_mlp where the model has shared_experts; files of other tools have either."""

    SHARED = "model.layers.1.mlp.shared_experts"

    def save(self, directory: Path, name: str, write=write_per_expert, **options) -> None:
        shrunken_model("hy_v3", dtype=torch.float32).save_pretrained(directory / "base")
        experts, _ = random_factors(width=64, num_experts=4)
        experts = {at: pair for at, pair in experts.items() if at[0] == 1}  # the first layer is dense
        linear = {}
        for part, r in (("up_proj", 3), ("down_proj", 4)):
            linear[f"model.layers.1.mlp.{name}.{part}.lora_A.weight"] = torch.randn(r, 64)
            linear[f"model.layers.1.mlp.{name}.{part}.lora_B.weight"] = torch.randn(64, r)
        write(directory / "adapter", directory / "base", experts, linear)
        edit_config(directory / "adapter", **options)

    @pytest.mark.parametrize("write", [write_per_expert, write_stacked])
    def test_patterns_match_checkpoint_names_first(self, write, tmp_path):
        """The file's author wrote the patterns for its own names; the model's names would match none of them."""
        patterns = {"shared_mlp.up_proj": 3, "shared_experts.down_proj": 4}
        # the model's name comes first here, and in alphabetical order
        alphas = {"shared_experts.up_proj": 1, "shared_mlp.up_proj": 8, "shared_experts.down_proj": 9}
        self.save(tmp_path, "shared_mlp", write, rank_pattern=patterns, alpha_pattern=alphas)
        config = read_adapter(tmp_path / "adapter").config
        assert rank_and_alpha(config, f"{self.SHARED}.up_proj") == (3, 8)
        assert rank_and_alpha(config, f"{self.SHARED}.down_proj") == (4, 9)

    def test_layer_under_both_names_is_rejected(self, tmp_path):
        """One would silently replace the other."""
        self.save(tmp_path, "shared_mlp", rank_pattern={"shared_mlp.up_proj": 3, "shared_mlp.down_proj": 4})
        again = {f"{self.SHARED}.down_proj.lora_{factor}.weight": torch.zeros(4, 4) for factor in "AB"}
        edit_tensors(tmp_path / "adapter", {f"{PREFIX}{key}": tensor for key, tensor in again.items()})
        with pytest.raises(ValueError, match=r"shared_(mlp|experts)\.down_proj and .* are names of the same layer"):
            read_adapter(tmp_path / "adapter")


class TestUnslothOrder:
    """unsloth stored experts-slowest before 2026.9.6, and records the order since then."""

    @pytest.fixture(scope="class")
    def made_by_peft(self, tmp_path_factory):
        return stock(tmp_path_factory.mktemp("peft"))

    @pytest.fixture
    def grouped(self, made_by_peft, tmp_path):
        """A stock adapter with its lora_B in the older order, and a config that marks it as written by unsloth."""
        directory = shutil.copytree(made_by_peft, tmp_path / "copy")
        tensors = tensors_of(directory / "adapter")
        stacks = {key: B for key, B in tensors.items() if "experts" in key and "lora_B" in key}
        regrouped = {key: B.unflatten(1, (3, 8)).mT.flatten(1) for key, B in stacks.items()}
        assert len(stacks) == STACKS
        edit_tensors(directory / "adapter", regrouped)
        edit_config(directory / "adapter", auto_mapping={"unsloth_fixed": True})
        return directory

    def logits_of_stock_peft(self, directory):
        return torch.load(directory / "logits.pt")[1]

    @pytest.mark.parametrize(
        "marker",
        [
            {"lora_B_layout": "grouped_by_expert"},
            {
                "unsloth_fused_expert_lora": {
                    "parameters": {
                        name: {"lora_B_layout": "grouped_by_expert", "num_experts": 8}
                        for name in ("gate_up_proj", "down_proj")
                    }
                }
            },
            {
                "auto_mapping": {
                    "unsloth_fixed": True,
                    "unsloth_fused_expert_lora": {"lora_B_layout": "grouped_by_expert", "parameters": {}},
                }
            },
        ],
        ids=["flat", "of each parameter", "in auto_mapping"],
    )
    def test_marker_determines_the_order(self, grouped, marker):
        edit_config(grouped / "adapter", **marker)
        assert_same_logits(logits_here(grouped), self.logits_of_stock_peft(grouped))
        with pytest.raises(ValueError, match=r"'experts-fastest' contradicts lora_B_layout='grouped_by_expert'"):
            read_adapter(grouped / "adapter", options=ReadOptions(lora_b_order="experts-fastest"))

    def test_newer_marker(self, made_by_peft, tmp_path):
        directory = shutil.copytree(made_by_peft, tmp_path / "copy")
        edit_config(directory / "adapter", auto_mapping={"unsloth_fixed": True}, lora_B_layout="rank_major")
        assert_same_logits(logits_here(directory), self.logits_of_stock_peft(directory))

    def test_order_is_required_without_a_marker(self, grouped):
        with pytest.raises(ValueError, match=r"without the order of lora_B.*--lora-b-order"):
            read_adapter(grouped / "adapter")
        options = ReadOptions(quant_type="none", lora_b_order="experts-slowest")
        assert_same_logits(logits_here(grouped, options), self.logits_of_stock_peft(grouped))

    def test_unknown_marker_is_rejected(self, grouped):
        edit_config(grouped / "adapter", lora_B_layout="mixed")
        with pytest.raises(
            ValueError, match=r"lora_B_layout='mixed' for model\.layers\.0\.mlp\.experts\.gate_up_proj"
        ):
            read_adapter(grouped / "adapter")
