"""Every model in the table of engines exists in transformers, has experts, and its adapter is written completely.

The layout that an engine requires for a model is found in its sources; `check_engines.py` runs them.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import check_engines
import engine_logits
import pytest
import torch
import transformers
from packaging.version import Version
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from shrunken_models import shrunken_config
from torch import nn

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.layouts import AdapterFile, engines, read_adapter
from peft_moe_qlora.layouts.adapter_file import ExpertFactors
from peft_moe_qlora.layouts.base_model import BaseModel
from peft_moe_qlora.layouts.engines import LLAMA_CPP, MLX, SGLANG, VLLM, Engine, write_for_engine

ENGINES = (VLLM, SGLANG, LLAMA_CPP, MLX)


def served(engine: Engine) -> set[str]:
    return {name for name, row in engine.rows.items() if row["layout"] != "refused"}


SERVED = sorted({name for engine in ENGINES for name in served(engine)})
REFUSED = sorted({name for engine in ENGINES for name in engine.rows.keys() - served(engine)})
WITH_A_VISION_TOWER = "Qwen3_5MoeForConditionalGeneration"
R, ALPHA = 3, 6
LINEAR_A, LINEAR_B = ".lora_A.weight", ".lora_B.weight"


def is_newest() -> bool:
    """Whether this version of transformers has every model of the table."""
    return Version(transformers.__version__) >= Version("5.23")


def model_class(class_name: str) -> type:
    found = getattr(transformers, class_name, None)
    if found is None:
        assert not is_newest()
        pytest.skip("this version of transformers doesn't have it")
    return found


def save_config(class_name: str, directory: Path) -> BaseModel:
    """Writes config.json of a small model, which is all that converting needs, and opens it."""
    model_type = model_class(class_name).config_class.model_type
    try:
        config = shrunken_config(model_type)
        config.architectures = [class_name]
        config.save_pretrained(directory)
        base = BaseModel.open(directory)
    except (TypeError, ValueError, AttributeError):
        assert not is_newest()
        pytest.skip("this version of transformers doesn't have this configuration")
    if not base.layouts:
        assert not is_newest()
        pytest.skip("this version of transformers doesn't have its experts fused")
    assert type(base.model).__name__ == class_name
    return base


def random_adapter(base: BaseModel, last_parts: tuple[str, ...]) -> AdapterFile:
    """On all experts, and on the linear layers with that name in the text model."""
    experts = []
    for path, layout in base.layouts.items():
        for projection in layout.projections:
            in_features, out_features = layout.features(projection)
            A, B = torch.randn(layout.num_experts, R, in_features), torch.randn(layout.num_experts, out_features, R)
            experts.append(ExpertFactors(path, projection, A, B, ALPHA / R, ALPHA))
    others = {}
    text_models = tuple({f"{path.partition('layers.')[0]}layers." for path in base.layouts})
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(text_models) and name.endswith(last_parts):
            others[name + LINEAR_A] = torch.randn(R, module.in_features)
            others[name + LINEAR_B] = torch.randn(module.out_features, R)
    config = MoeQLoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=["experts", *last_parts], base_model_name_or_path=str(base.directory)
    )
    return AdapterFile(config, tuple(experts), others)


def siblings_of(base: BaseModel, name: str) -> set[str]:
    """The other linear layers among query, key and value of the same attention."""
    block = name.rpartition(".")[0]
    names = {f"{block}.{last}" for last in ("q_proj", "k_proj", "v_proj")} - {name}
    modules = dict(base.model.named_modules())
    return {name for name in names if isinstance(modules.get(name), nn.Linear)}


@pytest.mark.parametrize("class_name", SERVED)
def test_written_adapter_has_all_factors(class_name, tmp_path):
    """For every engine: read back, it has every factor bit by bit, and zeros for the layers that an engine adds."""
    base = save_config(class_name, tmp_path / "base")
    adapter = random_adapter(base, (".q_proj",))
    adapted = {key.removesuffix(LINEAR_A) for key in adapter.non_expert if key.endswith(LINEAR_A)}
    joined = {one for name in adapted for one in siblings_of(base, name)}
    for engine in ENGINES:
        if class_name not in served(engine):
            continue
        out = tmp_path / engine.name
        write_for_engine(engine, adapter, out, base)
        found = read_adapter(out, base.directory)
        expected = {f"{one.name}.{factor}": getattr(one, factor) for one in adapter.experts for factor in "AB"}
        factors = {f"{one.name}.{factor}": getattr(one, factor) for one in found.experts for factor in "AB"}
        assert factors.keys() == expected.keys()
        assert all(torch.equal(factors[name], expected[name]) for name in expected)
        assert {one.scaling for one in found.experts} == {ALPHA / R}
        assert {key.removesuffix(LINEAR_A) for key in found.non_expert if key.endswith(LINEAR_A)} == adapted | joined
        assert all(torch.equal(found.non_expert[key], tensor) for key, tensor in adapter.non_expert.items())
        assert not any(found.non_expert[name + LINEAR_B].any() for name in joined)


@pytest.mark.parametrize(
    ("engine", "model_types"),
    [
        (VLLM, check_engines.IN_VLLM),
        (SGLANG, check_engines.IN_SGLANG),
        (MLX, engine_logits.IN_MLX),
        (LLAMA_CPP, engine_logits.IN_LLAMA_CPP),
    ],
    ids=["vLLM", "SGLang", "mlx-lm", "llama.cpp"],
)
def test_models_run_by_engines_are_in_the_table(engine, model_types):
    """A model removed from the table would be rejected without any other test failing."""
    of_type = {
        getattr(transformers, name).config_class.model_type: name for name in SERVED if hasattr(transformers, name)
    }
    known = {of_type[model_type] for model_type in model_types if model_type in of_type or is_newest()}
    assert len(known) > 5
    assert known <= served(engine)
    run = {name for name, row in engine.rows.items() if row["evidence"] == "run" and hasattr(transformers, name)}
    assert run == known


def test_every_row_has_a_known_engine_and_evidence():
    """A row with another version in its first column would belong to no engine."""
    file = Path(engines.__file__).with_name("engines.csv")
    with file.open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == sum(len(engine.rows) for engine in ENGINES)
    assert {row["evidence"] for row in rows} == {"run", "converted", "source"}
    assert {row["layout"] for row in rows} == {*engines._WRITERS, "refused"}


# models that only one of the engines stores as stacks; the README explains the consequence for the others
OF_DIFFERENT_LAYOUTS = {
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "GptOssForCausalLM",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
}


@pytest.mark.parametrize("class_name", SERVED)
def test_one_directory_serves_all_per_expert_engines(class_name, tmp_path):
    """A model that gets another layout for one engine is reported, unless it is a known exception."""
    engines = [engine for engine in (VLLM, SGLANG, LLAMA_CPP) if class_name in served(engine)]
    if len(engines) < 2:
        pytest.skip("nothing to compare: only one engine serves it")
    base = save_config(class_name, tmp_path / "base")
    adapter = random_adapter(base, ())
    files = []
    for engine in engines:
        out = tmp_path / engine.name
        write_for_engine(engine, adapter, out, base)
        files.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert all(one == files[0] for one in files) == (class_name not in OF_DIFFERENT_LAYOUTS)


def test_some_models_have_separate_query_key_and_value(tmp_path):
    """Otherwise the test above would check nothing."""
    base = save_config("Qwen3MoeForCausalLM", tmp_path)
    assert siblings_of(base, "model.layers.0.self_attn.q_proj") == {
        f"model.layers.0.self_attn.{name}" for name in ("k_proj", "v_proj")
    }


@pytest.mark.parametrize("class_name", REFUSED)
def test_rejected_classes_exist_and_are_in_no_table(class_name):
    """A misspelled name would hide the specific reason; a class in both lists would be served after all."""
    assert issubclass(model_class(class_name), transformers.PreTrainedModel)
    assert all(row["note"] for engine in ENGINES for row in engine.rows.values() if row["layout"] == "refused")


def linear(base: BaseModel, *names: str) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        module = base.model.get_submodule(name)
        found[name + LINEAR_A] = torch.ones(R, module.in_features)
        found[name + LINEAR_B] = torch.ones(module.out_features, R)
    return found


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name.split()[0])
def test_linear_layers_of_qwen3_moe_that_are_written(engine: Engine, tmp_path):
    """Every layer of its attention, and its head, which is outside the decoder layers."""
    base = save_config("Qwen3MoeForCausalLM", tmp_path / "base")
    experts = random_adapter(base, ())
    for last in ("q_proj", "k_proj", "v_proj", "o_proj"):
        name = f"model.layers.1.self_attn.{last}"
        write_for_engine(engine, replace(experts, non_expert=linear(base, name)), tmp_path / last, base)
    write_for_engine(engine, replace(experts, non_expert=linear(base, "lm_head")), tmp_path / "head", base)
    file = next((tmp_path / "head").glob("*.safetensors"))
    assert any("lm_head" in key for key in load_file(file))
    assert (tmp_path / "head" / CONFIG_NAME).is_file()


@pytest.mark.parametrize("last", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name.split()[0])
def test_shared_experts_are_written(engine: Engine, last, tmp_path):
    """Each of the three projections of DeepSeek V3's shared experts."""
    base = save_config("DeepseekV3ForCausalLM", tmp_path / "base")
    names = [f"model.layers.{layer}.mlp.shared_experts.{last}" for layer in range(2)]
    adapter = replace(random_adapter(base, ()), non_expert=linear(base, *names))
    write_for_engine(engine, adapter, tmp_path / "out", base)
    found = read_adapter(tmp_path / "out", base.directory).non_expert
    assert all(torch.equal(found[key], tensor) for key, tensor in adapter.non_expert.items())


@pytest.mark.parametrize("of_experts", [True, False], ids=["of experts", "of a linear layer"])
def test_largest_rank_of_vllm(of_experts, tmp_path):
    """512, the largest choice of `max_lora_rank`, is accepted; 513 is not, in whichever layer."""
    base = save_config("Qwen3MoeForCausalLM", tmp_path / "base")
    adapter = random_adapter(base, (".q_proj",))

    def with_rank(r: int) -> AdapterFile:
        experts, others = adapter.experts, dict(adapter.non_expert)
        config = adapter.config
        if of_experts:
            wider = [
                replace(one, A=one.A.new_ones(len(one.A), r, one.A.shape[2]), B=one.B.new_ones(*one.B.shape[:2], r))
                for one in experts
            ]
            return AdapterFile(config, tuple(wider), others)
        name = "model.layers.0.self_attn.q_proj"
        others |= {name + LINEAR_A: torch.ones(r, 64), name + LINEAR_B: torch.ones(64, r)}
        return AdapterFile(replace(config, rank_pattern={"layers.0.self_attn.q_proj": r}), experts, others)

    write_for_engine(VLLM, with_rank(512), tmp_path / "512", base)
    with pytest.raises(ValueError, match=r"rank 513, but .* supports ranks up to 512"):
        write_for_engine(VLLM, with_rank(513), tmp_path / "513", base)


def test_mlx_names_of_a_model_with_a_vision_tower(tmp_path):
    """mlx-lm has another name for the text model of Qwen3.5 than the checkpoint; gate and up are separate."""
    base = save_config(WITH_A_VISION_TOWER, tmp_path / "base")
    adapter = random_adapter(base, (".q_proj",))
    write_for_engine(MLX, adapter, tmp_path / "out", base)
    found = load_file(tmp_path / "out" / "adapters.safetensors")
    assert all(key.startswith("language_model.model.layers.") for key in found)
    assert len(adapter.experts) == 4
    for one in adapter.experts:
        layer = one.path.removeprefix("model.language_model.").removesuffix(".experts")
        parts = {"down_proj": one.B}
        if one.projection == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), one.B.chunk(2, dim=1)))
        for part, B in parts.items():
            name = f"language_model.model.{layer}.switch_mlp.{part}"
            assert torch.equal(found[f"{name}.lora_a"], one.A)
            assert torch.equal(found[f"{name}.lora_b"], B)


def test_4_bit_gpt_oss_is_rejected_for_sglang_only(tmp_path):
    """SGLang supports LoRA on MXFP4 experts, except for gpt-oss."""
    for class_name, is_refused in (("GptOssForCausalLM", True), ("Qwen3MoeForCausalLM", False)):
        directory = tmp_path / class_name
        base = save_config(class_name, directory)
        base.model.config.quantization_config = {"quant_method": "mxfp4"}
        assert base.quantization == "mxfp4"
        write_for_engine(VLLM, random_adapter(base, ()), directory / "vllm", base)
        if is_refused:
            with pytest.raises(ValueError, match=r"by mxfp4, and .* does not support LoRA on experts"):
                write_for_engine(SGLANG, random_adapter(base, ()), directory / "sglang", base)
        else:
            write_for_engine(SGLANG, random_adapter(base, ()), directory / "sglang", base)
