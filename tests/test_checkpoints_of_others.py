"""Checkpoints quantized by other tools: every key family, and every kind of damage."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from checkpoint_writers import Tensors, pack, packed, read_tensors, set_bitsandbytes_config, write_tensors
from peft import get_peft_model
from shrunken_models import shrunken_model, shrunken_model_or_skip
from tiny_models import logits, tiny_model, token_ids

from peft_moe_qlora import (
    CheckpointError,
    MoeQLoraConfig,
    MoeQuantizationConfig,
    experts_report,
    load_experts,
    load_quantized,
    save_bitsandbytes,
)
from peft_moe_qlora.loading import Checkpoint
from peft_moe_qlora.quantization import DenseStack, QuantizedStack

EXPERT_KEY = re.compile(r"\.experts\..*(proj|w[123])(\.weight)?$")


def save_tiny(directory: Path, model_type: str = "qwen3_moe", **sizes) -> Tensors:
    """Saves a 16-bit model whose rows are multiples of the block size, and returns its tensors."""
    width = "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"
    tiny_model(model_type, dtype=torch.bfloat16, **{width: 64, **sizes}).save_pretrained(directory)
    return read_tensors(directory)


def is_expert(key: str) -> bool:
    return EXPERT_KEY.search(key) is not None


def fused(tensors: Tensors, suffix: str = "") -> Tensors:
    """Experts of qwen3_moe under the names of fused stacks."""
    found = {key: tensor for key, tensor in tensors.items() if not is_expert(key)}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            name: torch.stack([tensors[f"{prefix}.{expert}.{name}.weight"] for expert in range(8)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        found[f"{prefix}.gate_up_proj{suffix}"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
        found[f"{prefix}.down_proj{suffix}"] = parts["down_proj"]
    return found


def decoded(tensors: Tensors, key: str) -> torch.Tensor:
    """Decoded by bitsandbytes."""
    parts = {name.removeprefix(f"{key}."): part for name, part in tensors.items() if name.startswith(f"{key}.")}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    return bnb.dequantize_4bit(tensors[key], state)


def stacks_of(model: torch.nn.Module, layer: int = 0) -> tuple:
    experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
    return experts.gate_up_proj, experts.down_proj


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_per_expert_keys(nested, quant_type, num_shards, tmp_path):
    tensors = pack(save_tiny(tmp_path), is_expert, quant_type=quant_type, nested=nested)
    write_tensors(tmp_path, tensors, num_shards)
    set_bitsandbytes_config(tmp_path, ["lm_head", "self_attn"])
    model = load_quantized(tmp_path, device_map="cpu")
    for layer in range(2):
        gate_up, down = stacks_of(model, layer)
        prefix = f"model.layers.{layer}.mlp.experts"
        for expert in range(8):
            keys = [f"{prefix}.{expert}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
            halves = torch.cat([tensors[key].flatten() for key in keys[:2]])
            assert torch.equal(gate_up.codes[expert], halves)
            assert torch.equal(down.codes[expert], tensors[keys[2]].flatten())
            weights = [decoded(tensors, key) for key in keys]
            assert torch.equal(gate_up.decode_expert(expert, torch.bfloat16), torch.cat(weights[:2]))
            assert torch.equal(down.decode_expert(expert, torch.bfloat16), weights[2])
    assert gate_up.storage.quant_type == model.config.quantization_config.quant_type == quant_type
    assert not any(parameter.requires_grad for parameter in gate_up.parameters())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8], ids=str)
def test_codes_stored_as_another_dtype(storage, dtype, nested, tmp_path):
    """`bnb_4bit_quant_storage`: the same bytes, also of linear layers. They must not be cast like numbers."""

    def is_packed(key: str) -> bool:
        return is_expert(key) or "self_attn.q_proj" in key

    original = save_tiny(tmp_path)
    set_bitsandbytes_config(tmp_path, ["lm_head"])
    found = []
    for one in (torch.uint8, storage):
        write_tensors(tmp_path, pack(original, is_packed, nested=nested, storage=one))
        found.append(load_quantized(tmp_path, device_map="cpu", dtype=dtype))
    expected, model = found
    for layer in range(2):
        for stack, other in zip(stacks_of(model, layer), stacks_of(expected, layer)):
            assert torch.equal(stack.codes, other.codes)
            assert torch.equal(stack.block_absmax, other.block_absmax)
        linear, other = (one.model.layers[layer].self_attn.q_proj.weight for one in (model, expected))
        assert linear.dtype == storage
        assert torch.equal(linear.data.flatten().view(torch.uint8), other.data.flatten())
    for save in (model.save_pretrained, partial(save_bitsandbytes, model)):
        save(tmp_path / "again")
        again = load_quantized(tmp_path / "again", device_map="cpu", dtype=dtype)
        linear = again.model.layers[0].self_attn.q_proj.weight
        assert torch.equal(
            linear.data.view(torch.uint8), model.model.layers[0].self_attn.q_proj.weight.view(torch.uint8)
        )
        assert torch.equal(stacks_of(again)[0].codes, stacks_of(model)[0].codes)
    assert torch.equal(logits(model, token_ids()), logits(expected, token_ids()))


def test_linear_layers_with_mixed_code_dtypes(tmp_path):
    """bitsandbytes' quantizer has one dtype for all."""
    tensors = pack(save_tiny(tmp_path), lambda key: is_expert(key) or "q_proj" in key)
    key = "model.layers.1.self_attn.q_proj.weight"
    tensors[key] = tensors[key].flatten().view(torch.bfloat16)
    write_tensors(tmp_path, tensors)
    set_bitsandbytes_config(tmp_path, ["lm_head"])
    with pytest.raises(CheckpointError, match=r"q_proj\.weight \(U8 .* \(BF16 .* codes in different dtypes"):
        load_quantized(tmp_path, device_map="cpu")


def test_w1_w2_w3_keys(tmp_path):
    tensors = pack(save_tiny(tmp_path, "mixtral"), is_expert)
    write_tensors(tmp_path, tensors)
    set_bitsandbytes_config(tmp_path, ["lm_head", "self_attn"])
    gate_up, down = stacks_of(load_quantized(tmp_path, device_map="cpu"))
    prefix = "model.layers.0.block_sparse_moe.experts.3"
    halves = [decoded(tensors, f"{prefix}.{name}.weight") for name in ("w1", "w3")]
    assert torch.equal(gate_up.decode_expert(3, torch.bfloat16), torch.cat(halves))
    assert torch.equal(down.decode_expert(3, torch.bfloat16), decoded(tensors, f"{prefix}.w2.weight"))


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_per_stack_keys(suffix, nested, tmp_path):
    tensors = fused(save_tiny(tmp_path), suffix)
    tensors = pack(tensors, is_expert, nested=nested)
    write_tensors(tmp_path, tensors)
    set_bitsandbytes_config(tmp_path, ["lm_head", "self_attn"])
    for stack, name in zip(stacks_of(load_quantized(tmp_path, device_map="cpu"), 1), ("gate_up_proj", "down_proj")):
        key = f"model.layers.1.mlp.experts.{name}{suffix}"
        assert torch.equal(stack.codes.flatten(), tensors[key].flatten())
        assert torch.equal(stack.decode(torch.bfloat16), decoded(tensors, key))


@pytest.mark.parametrize("layout", ["fused", "per expert"])
def test_llama_4(layout, tmp_path):
    """Stacks stored (in, out) keep their blocks along the outputs; single experts have them along the inputs."""
    model = shrunken_model("llama4")
    model.save_pretrained(tmp_path)
    tensors, cut = read_tensors(tmp_path), {}
    for key in [key for key in tensors if re.search(r"experts\.(gate_up|down)_proj$", key)]:
        stack = tensors.pop(key)
        if layout == "fused":
            cut[f"{key}.weight"] = stack
        for expert in range(4) if layout == "per expert" else ():
            prefix = key.rpartition(".")[0] + f".{expert}."
            if key.endswith("gate_up_proj"):
                gate, up = stack[expert].chunk(2, dim=1)
                cut |= {f"{prefix}gate_proj.weight": gate.T.contiguous(), f"{prefix}up_proj.weight": up.T.contiguous()}
            else:
                cut[f"{prefix}down_proj.weight"] = stack[expert].T.contiguous()
    tensors = pack({**tensors, **cut}, cut.__contains__, nested=True)
    write_tensors(tmp_path, tensors)
    set_bitsandbytes_config(tmp_path, ["lm_head", "self_attn"])
    loaded = load_quantized(tmp_path, device_map="cpu")
    experts = loaded.get_submodule("language_model.model.layers.0.feed_forward.experts")
    key = "language_model.model.layers.0.feed_forward.experts"
    if layout == "fused":
        assert f"{key}.down_proj.weight.quant_state.bitsandbytes__nf4" in tensors
        expected = decoded(tensors, f"{key}.down_proj.weight")
    else:
        expected = torch.stack([decoded(tensors, f"{key}.{expert}.down_proj.weight") for expert in range(4)])
    assert torch.equal(experts.down_proj.decode(torch.bfloat16), expected)
    assert experts.down_proj.is_transposed == (layout == "fused")

    for save in (loaded.save_pretrained, partial(save_bitsandbytes, loaded)):
        save(tmp_path / "again")
        again = load_quantized(tmp_path / "again", device_map="cpu")
        again = again.get_submodule("language_model.model.layers.0.feed_forward.experts")
        for stack, one in ((again.down_proj, experts.down_proj), (again.gate_up_proj, experts.gate_up_proj)):
            assert torch.equal(stack.codes, one.codes)
            assert stack.is_transposed == one.is_transposed

    # loads, trains and generates
    language_model, ids = loaded.language_model, token_ids(length=6)
    generated = language_model.generate(ids, max_new_tokens=2, do_sample=False)
    assert generated.shape == (2, 8)
    restored = load_quantized(tmp_path, device_map="cpu").dequantize().language_model
    torch.testing.assert_close(logits(language_model, ids), logits(restored, ids), rtol=0.05, atol=0.05)


def test_16_bit_layers_stay_in_16_bits(tmp_path):
    """A "dynamic" checkpoint: the experts of one layer, and one projection of another, are not packed."""
    original = save_tiny(tmp_path)
    tensors = pack(original, lambda key: is_expert(key) and ".layers.0." in key and "down_proj" not in key)
    write_tensors(tmp_path, tensors)
    set_bitsandbytes_config(tmp_path, ["lm_head", "self_attn"])
    model = load_quantized(tmp_path, device_map="cpu")
    kinds = [type(stack) for layer in range(2) for stack in stacks_of(model, layer)]
    assert kinds == [QuantizedStack, DenseStack, DenseStack, DenseStack]
    expected = torch.stack([original[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(8)])
    assert torch.equal(stacks_of(model, 1)[1].weight, expected)
    assert [stack.storage for stack in experts_report(model).stacks] == ["nf4/64", "bfloat16", "bfloat16", "bfloat16"]
    model.save_pretrained(tmp_path / "again")
    again = load_quantized(tmp_path / "again", device_map="cpu")
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


def test_adapter_on_a_checkpoint_with_16_bit_layers(tmp_path):
    tensors = pack(save_tiny(tmp_path), lambda key: is_expert(key) and ".layers.0." in key)
    write_tensors(tmp_path, tensors)
    set_bitsandbytes_config(tmp_path, ["lm_head", "self_attn"])
    model = get_peft_model(
        load_quantized(tmp_path, device_map="cpu"), MoeQLoraConfig(r=4, target_modules="all-linear")
    )
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert [stack.storage for stack in model.experts_report().stacks] == ["nf4/64"] * 2 + ["bfloat16"] * 2


def test_linear_layers_are_quantized_as_in_the_checkpoint(tmp_path):
    """Regardless of its config."""
    tensors = save_tiny(tmp_path)
    tensors = pack(tensors, lambda key: is_expert(key) or (".layers.0." in key and "q_proj" in key))
    write_tensors(tmp_path, tensors)
    set_bitsandbytes_config(tmp_path, ["lm_head"])
    model = load_quantized(tmp_path, device_map="cpu")
    assert [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"] == [
        "model.layers.0.self_attn.q_proj"
    ]


def without(key: str):
    def change(tensors: Tensors) -> None:
        del tensors[key]

    return change


def replaced(key: str, value: torch.Tensor):
    def change(tensors: Tensors) -> None:
        assert key in tensors
        tensors[key] = value

    return change


def added(key: str, value: torch.Tensor):
    def change(tensors: Tensors) -> None:
        assert key not in tensors
        tensors[key] = value

    return change


GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"

BROKEN_DENSE = {
    "an expert is missing": (without(GATE), "lacks expert 2"),
    "a projection of all experts is missing": (
        lambda t: [t.pop(key) for key in list(t) if "layers.1." in key and "up_proj" in key],
        "has no tensors .*up_proj",
    ),
    "a layer is missing": (
        lambda t: [t.pop(key) for key in list(t) if "layers.1.mlp.experts" in key],
        "no tensor for model.layers.1.mlp.experts",
    ),
    "one expert too many": (added(GATE.replace(".2.", ".8."), torch.zeros(64, 64)), "experts.8.gate_proj"),
    "a layer too many": (added(GATE.replace("layers.1", "layers.7"), torch.zeros(64, 64)), "layers.7.mlp.experts"),
    "a tensor that no expert has": (
        added(GATE.replace("gate_proj.weight", "gate_proj.bias"), torch.zeros(64)),
        "gate_proj.bias .* matches none",
    ),
    "of another shape": (replaced(DOWN, torch.zeros(64, 32)), r"experts.2.down_proj.weight \(F32 \[64, 32\]"),
    "all of another shape": (
        lambda t: [t.update({key: t[key][:, :32]}) for key in list(t) if "down_proj" in key],
        r"shape \(64, 32\) for model.layers.0.mlp.experts.down_proj. Expected shape \(64, 64\)",
    ),
    "scaled by another scheme": (
        replaced(GATE, torch.zeros(64, 64, dtype=torch.float8_e4m3fn)),
        "gate_proj.weight .*F8_E4M3.* dtype that is not supported",
    ),
    "packed by another scheme": (
        replaced(GATE, torch.zeros(64, 32, dtype=torch.int32)),
        "gate_proj.weight .*I32.* dtype that is not supported",
    ),
    "fused beside apart": (
        added("model.layers.1.mlp.experts.gate_up_proj", torch.zeros(8, 128, 64)),
        "mixture of two",
    ),
    "not a number": (replaced(GATE, torch.full((64, 64), float("nan"), dtype=torch.bfloat16)), "experts.2.gate_proj"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN_DENSE.values(), ids=BROKEN_DENSE.keys())
def test_damaged_16_bit_checkpoints(change, message, tmp_path):
    tensors = save_tiny(tmp_path)
    change(tensors)
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(tmp_path, device_map="cpu")


def test_missing_projection_of_a_fused_tensor(tmp_path):
    shrunken_model("ernie4_5_vl_moe").save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path)
    write_tensors(tmp_path, {key: tensor for key, tensor in tensors.items() if "up_proj" not in key})
    with pytest.raises(CheckpointError, match=r"no tensors .*up_proj.* for .*gate_up_proj, .*addition to .*gate_proj"):
        load_quantized(tmp_path, device_map="cpu")


def test_scale_keys_of_quantized_checkpoints(tmp_path):
    """A conversion lists them, but 16-bit weights do not need them; 8-bit weights are rejected as such."""
    shrunken_model_or_skip("inkling2_loop_text").save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path)
    key = "model.llm.layers.0.mlp.experts.w2_weight"
    stack = load_quantized(tmp_path, device_map="cpu").get_submodule("model.layers.0.mlp.experts").down_proj
    expected = QuantizedStack.from_dense(tensors[key], False, stack.storage)
    assert torch.equal(stack.codes, expected.codes)
    scales = torch.full((*tensors[key].shape[:2], tensors[key].shape[2] // 32), 127, dtype=torch.uint8)
    write_tensors(tmp_path, {**tensors, key: tensors[key].to(torch.float8_e4m3fn), f"{key}_scale": scales})
    with pytest.raises(CheckpointError, match=r"w2_weight \(F8_E4M3 .*dtype that is not supported"):
        load_quantized(tmp_path, device_map="cpu")


BROKEN_PACKED = {
    "no scales": (without(f"{GATE}.absmax"), "lacks .*gate_proj.weight.absmax"),
    "no state": (without(f"{GATE}.quant_state.bitsandbytes__nf4"), "has 0 tensors .quant_state"),
    "scales of the wrong length": (replaced(f"{GATE}.absmax", torch.ones(63)), r"absmax \(F32 \[63\].* 64 values"),
    "codes cut off": (replaced(GATE, torch.zeros(2047, 1, dtype=torch.uint8)), "2048 values"),
    "codes without their weight": (without(GATE), "which the checkpoint does not have"),
    "another table": (replaced(f"{GATE}.quant_map", torch.linspace(-1, 1, 16)), "not the table of nf4"),
    "a state that is no text": (
        replaced(f"{GATE}.quant_state.bitsandbytes__nf4", torch.full((9,), 255, dtype=torch.uint8)),
        "not a quantization state",
    ),
    "another storage": (lambda t: t.update(packed(DOWN, torch.randn(64, 64), blocksize=128)), "nf4/128.* nf4/64"),
    "another shape": (lambda t: t.update(packed(DOWN, torch.randn(128, 32))), r"\[128, 32\]"),
    "one expert in 16 bits": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(GATE)] and t.update({GATE: torch.zeros(64, 64)}),
        "mixture of two",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN_PACKED.values(), ids=BROKEN_PACKED.keys())
def test_damaged_packed_checkpoints(change, message, tmp_path):
    tensors = pack(save_tiny(tmp_path), is_expert)
    change(tensors)
    write_tensors(tmp_path, tensors)
    set_bitsandbytes_config(tmp_path, ["lm_head", "self_attn"])
    with pytest.raises(CheckpointError, match=message):
        load_quantized(tmp_path, device_map="cpu")


STACK = "model.layers.1.mlp.experts.down_proj"
BROKEN_OWN = {
    "no codes": (without(f"{STACK}.codes"), "not model.layers.1.mlp.experts.down_proj.codes"),
    "no scales": (without(f"{STACK}.block_absmax"), "not model.layers.1.mlp.experts.down_proj.block_absmax"),
    "scales of the wrong length": (
        replaced(f"{STACK}.block_absmax", torch.ones(8, 63).view(torch.int32)),
        r"block_absmax \(I32 \[8, 63",
    ),
    "scales as numbers": (replaced(f"{STACK}.block_absmax", torch.ones(8, 64)), r"block_absmax \(F32"),
    "scales in 16 bits": (replaced(f"{STACK}.block_absmax", torch.ones(8, 64).half()), r"block_absmax \(F16"),
    "a stack too many": (added(STACK.replace("1", "4") + ".codes", torch.ones(8, 9)), "layers.4.mlp.experts"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN_OWN.values(), ids=BROKEN_OWN.keys())
def test_damaged_checkpoints_of_this_package(change, message, tmp_path):
    save_tiny(tmp_path / "dense")
    load_quantized(tmp_path / "dense", MoeQuantizationConfig(quantize_linear=False), device_map="cpu").save_pretrained(
        tmp_path
    )
    tensors = read_tensors(tmp_path)
    change(tensors)
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(tmp_path, device_map="cpu")


def cut_header(directory: Path) -> None:
    file = directory / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def cut_values(directory: Path) -> None:
    file = directory / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def list_missing_tensor(directory: Path) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.0.mlp.experts.99.up_proj.weight"] = "model-00002-of-00003.safetensors"
    file.write_text(json.dumps(index))


BROKEN_FILES = {
    "a shard is missing": (
        lambda d: (d / "model-00002-of-00003.safetensors").unlink(),
        "index.json lists model-00002-of-00003.safetensors, which does not exist",
    ),
    "a header is cut off": (cut_header, "model-00002-of-00003.safetensors cannot be opened"),
    "values are cut off": (cut_values, "model-00002-of-00003.safetensors cannot be opened"),
    "the index promises more": (list_missing_tensor, "00002-of-00003.safetensors has no tensor .*experts.99.up_proj"),
    "the index is no index": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "is not a checkpoint index",
    ),
    "no files": (lambda d: [file.unlink() for file in d.glob("model*")], "neither model.safetensors.index.json nor"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_damaged_files(change, message, tmp_path):
    tensors = save_tiny(tmp_path)
    write_tensors(tmp_path, tensors, num_shards=3)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        load_experts(model, tmp_path)
    assert type(model.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"


def test_missing_biases(tmp_path):
    tensors = save_tiny(tmp_path, "gpt_oss")
    del tensors["model.layers.1.mlp.experts.down_proj_bias"]
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.experts\.down_proj_bias"):
        load_quantized(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "something_new"])
def test_unknown_schemes(method, tmp_path):
    save_tiny(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=f"quantized by '{method}'"):
        load_quantized(tmp_path, device_map="cpu")


def test_requantizing_is_rejected(tmp_path):
    write_tensors(tmp_path, pack(save_tiny(tmp_path), is_expert))
    set_bitsandbytes_config(tmp_path, ["lm_head"])
    with pytest.raises(ValueError, match="already quantized"):
        load_quantized(tmp_path, MoeQuantizationConfig())
