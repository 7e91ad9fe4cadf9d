"""Merged weights streamed from a live model: bitwise as a merge writes them, with little memory."""

from __future__ import annotations

import gc
import json

import pytest
import torch
import transformers
from checkpoint_writers import read_tensors
from merged_checkpoints import merge
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from shrunken_models import shrunken_config, shrunken_model_or_skip
from tiny_models import assert_same_bytes, packed_bytes, randomize_adapter, tiny_config, tiny_model
from torch import nn

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, load_quantized
from peft_moe_qlora.layouts import adapter_for_engine, convert_adapter
from peft_moe_qlora.merge import LiveWeights, live_weights
from peft_moe_qlora.quantization import parse_format
from peft_moe_qlora.quantized_linear import QuantizedLinear


def streamed(model: nn.Module, *args, **kwargs) -> dict[str, torch.Tensor]:
    found = list(live_weights(model, *args, **kwargs))
    keys = [key for key, _ in found]
    assert len(keys) == len(set(keys))
    return {key: tensor.clone() for key, tensor in found}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert {key: one.dtype for key, one in found.items()} == {key: one.dtype for key, one in expected.items()}
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


def merged_in_memory(model: nn.Module, directory, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model.merge_and_unload(progressbar=False, dtype=dtype).save_pretrained(directory / "in memory")
    return read_tensors(directory / "in memory")


# single experts' tensors under two naming schemes, a transposed fused stack, one with other names, shared experts
# and a buffer, several tensors that are fused into one, towers next to the text model
TYPES = ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "ernie4_5_vl_moe", "qwen3_5_moe", "llama4"]


@pytest.mark.parametrize("model_type", TYPES)
def test_all_weights_equal_merging_in_memory_and_saving(model_type, tmp_path):
    config = MoeQLoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    model = get_peft_model(shrunken_model_or_skip(model_type), config)
    randomize_adapter(model, std=0.02)
    before = packed_bytes(model)
    found, adapted = streamed(model, only_adapted=False), streamed(model, None)
    assert_same_bytes(packed_bytes(model), before)
    expected = merged_in_memory(model, tmp_path, torch.bfloat16)
    assert_equal(found, expected)
    assert adapted.keys() < expected.keys()
    assert_equal(adapted, {key: expected[key] for key in adapted})


def test_transposed_stacks_are_streamed_as_published(tmp_path):
    """transformers loads Qwen3-VL-MoE in both orientations and saves its class's; vLLM reads the published one."""
    model = get_peft_model(shrunken_model_or_skip("qwen3_vl_moe"), MoeQLoraConfig(r=4, target_modules=["experts"]))
    randomize_adapter(model, std=0.02)
    found = streamed(model)
    expected = merged_in_memory(model, tmp_path, torch.bfloat16)
    stacks = [key for key in found if ".experts." in key]
    assert len(stacks) == 2
    assert all(torch.equal(found[key], expected[key].mT) for key in stacks)


def save_in_4_bits(directory, model_type: str, **options):
    """Base and adapter on disk, experts and linear layers in 4 bits; returns the unmerged model."""
    model = tiny_model(model_type)
    model.save_pretrained(directory / "base")
    quantization = MoeQuantizationConfig(quantize_linear=True)
    model = load_quantized(str(directory / "base"), quantization, dtype=torch.float32, device_map="cpu")
    # 2 as the scaling: a multiplication by it is exact at any point
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    model = get_peft_model(model, MoeQLoraConfig(**config)).eval()
    randomize_adapter(model)
    return model


# not gpt_oss in bf16: on disk, norms keep the checkpoint's fp32, which loading in bf16 does not
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [(name, torch.float32) for name in ("qwen3_moe", "mixtral", "gpt_oss")] + [("mixtral", torch.bfloat16)],
)
def test_all_weights_equal_merging_on_disk(model_type, dtype, tmp_path):
    """Including adapted and unadapted bitsandbytes layers, and trained embeddings, biases and routers."""
    options = {"bias": "all"} if model_type == "gpt_oss" else {"modules_to_save": ["norm"]}
    targets = r".*experts|.*[qv]_proj|.*embed_tokens"
    model = save_in_4_bits(tmp_path, model_type, target_modules=targets, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" not in name:
                parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path, dtype=dtype)
    expected = read_tensors(tmp_path / "merged")
    assert_equal(streamed(model, only_adapted=False, dtype=dtype), expected)
    base = {key: one.to(dtype) for key, one in read_tensors(tmp_path / "base").items()}
    adapted = streamed(model, None, dtype=dtype)
    assert_equal(adapted, {key: expected[key] for key in adapted})
    same = {key for key in expected if torch.equal(expected[key], base[key])}
    assert same.isdisjoint(adapted)
    # all other changes are in layers that were in 4 bits in training and have no adapter
    others = expected.keys() - same - adapted.keys()
    assert {key.split(".")[-2] for key in others} <= {"k_proj", "o_proj"}


def test_layers_in_a_format_and_several_adapters(tmp_path):
    """Linear layers that are not bitsandbytes layers; two adapters at once, for which PEFT's layers round twice."""
    model = shrunken_model_or_skip("qwen3_moe")
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj"):
        setattr(attention, name, QuantizedLinear.from_linear(getattr(attention, name), parse_format("int8/channel")))
    model = get_peft_model(model, MoeQLoraConfig(r=4, lora_alpha=6, target_modules=["experts", "1.self_attn.q_proj"]))
    model.add_adapter(
        "other", MoeQLoraConfig(r=2, lora_alpha=6, target_modules=["experts.down_proj", "1.self_attn.q_proj"])
    )
    randomize_adapter(model, std=0.02)
    model.base_model.set_adapter(["default", "other"])
    found = streamed(model, only_adapted=False)
    one = streamed(model, only_adapted=False, adapter_names=["default"])
    assert_equal(found, merged_in_memory(model, tmp_path, torch.bfloat16))
    assert any(not torch.equal(one[key], found[key]) for key in found)


def test_layers_fused_by_vllm_are_streamed_together():
    model = get_peft_model(
        tiny_model("qwen3_moe"), MoeQLoraConfig(r=2, target_modules=["experts.down_proj", "q_proj"])
    )
    alone, joined = streamed(model, None), streamed(model, "vllm")
    assert {key.split(".")[-2] for key in alone} == {"down_proj", "q_proj"}
    added = {".".join(key.split(".")[3:]) for key in joined.keys() - alone.keys()}
    attention = {f"self_attn.{name}.weight" for name in ("k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    experts = {f"mlp.experts.{number}.{name}.weight" for number in range(8) for name in ("gate_proj", "up_proj")}
    assert added == attention | experts


def test_streamed_weights_follow_the_training():
    model = get_peft_model(tiny_model("qwen3_moe"), MoeQLoraConfig(r=2, target_modules="all-linear"))
    weights = LiveWeights(model, None)
    first = {key: one.clone() for key, one in weights}
    randomize_adapter(model)
    second = {key: one.clone() for key, one in weights}
    assert first.keys() == second.keys()
    assert not [key for key in first if torch.equal(first[key], second[key])]
    assert_equal(second, streamed(model, None))


def test_text_model_uses_names_of_the_whole_checkpoint(tmp_path):
    """AutoModelForCausalLM loads the text model of a checkpoint that has towers."""
    shrunken_model_or_skip("qwen3_5_moe")
    whole = transformers.Qwen3_5MoeForConditionalGeneration(shrunken_config("qwen3_5_moe")).to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "base")
    keys = read_tensors(tmp_path / "base").keys()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = get_peft_model(model, MoeQLoraConfig(r=2, target_modules=["experts"]))
    found = streamed(model)
    assert found.keys() <= keys
    assert any("language_model" in key for key in found)


def test_memory_is_that_of_a_few_experts():
    """A stack of 16 experts of 1 MB each in fp32 is never in memory as a whole."""
    config = tiny_config("qwen3_moe", hidden_size=256, moe_intermediate_size=512, num_experts=16, num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model = get_peft_model(model, MoeQLoraConfig(r=2, target_modules=["experts"]))
    weights = LiveWeights(model, None)

    def held() -> int:
        # excludes fake tensors of earlier tests, which have no storage
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())

    gc.collect()
    before, peak, total = held(), 0, 0
    for number, (_, tensor) in enumerate(weights):
        total += tensor.nbytes
        if number % 8 == 0:
            peak = max(peak, held() - before)
    assert total == 16 * 3 * 256 * 512 * 2
    assert peak < total / 8


def test_unsupported_cases_are_rejected():
    model = get_peft_model(tiny_model("qwen3_moe"), MoeQLoraConfig(r=2))
    for options, message in (
        ({"engine": "other"}, "engine='other' is unknown"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not supported for merged weights"),
        ({"adapter_names": ["missing"]}, "The model has no adapter 'missing'"),
    ):
        with pytest.raises(ValueError, match=message):
            live_weights(model, **options)
    with pytest.raises(ValueError, match="Expected a PeftModel with LoRA"):
        live_weights(tiny_model("qwen3_moe"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj has merged adapters"):
        list(live_weights(model))
    model.unmerge_adapter()
    with torch.no_grad():
        next(one for name, one in model.named_parameters() if ".lora_A" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        list(live_weights(model))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_engine_adapter_equals_a_converted_saved_adapter(model_type, engine, tmp_path):
    base = tiny_model(model_type)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    options = {"use_rslora": True, "expert_r": 3, "rank_pattern": {"layers.1.*experts.down_proj": 2}}
    model = get_peft_model(base, MoeQLoraConfig(r=4, target_modules=r".*experts|.*[qv]_proj", **options))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "out", engine, tmp_path / "base")
    tensors, config = adapter_for_engine(model, engine)
    save_file(tensors, tmp_path / "live.safetensors", {"format": "pt"})
    expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert_equal(load_file(tmp_path / "live.safetensors"), expected)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    written["target_modules"].sort()  # a set, in any order
    assert config == written
    assert not [one for one in tensors.values() if one.requires_grad]


def test_engine_adapter_for_other_file_formats_is_rejected(tmp_path):
    model = get_peft_model(tiny_model("qwen3_moe"), MoeQLoraConfig(r=2))
    with pytest.raises(ValueError, match=r"engine='mlx' is not supported here"):
        adapter_for_engine(model, "mlx")
    with pytest.raises(ValueError, match="The adapter 'missing' cannot be exported"):
        adapter_for_engine(model, "vllm", "missing")
