"""A merge adds deltas to the weights as used in training, whatever the checkpoint has."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb
from checkpoint_writers import read_tensors
from merged_checkpoints import merge
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import randomize_adapter, tiny_model

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, load_quantized
from peft_moe_qlora.layouts.base_model import BaseModel

LINEAR = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"]


def save_trained_in_bf16(directory, model_type: str):
    """An fp32 checkpoint, loaded in bf16 and 4 bits except for the last layer's experts; some of it is adapted."""
    tiny_model(model_type).save_pretrained(directory / "base")
    quantization = MoeQuantizationConfig(skip_modules=["layers.1.mlp.experts"])
    model = load_quantized(str(directory / "base"), quantization, dtype=torch.bfloat16, device_map="cpu")
    targets = ["experts.down_proj", "q_proj"]
    model = get_peft_model(model, MoeQLoraConfig(r=2, lora_alpha=6, target_modules=targets)).eval()
    randomize_adapter(model, std=0.05)
    model.save_pretrained(directory / "adapter")
    return model


def delta(directory, name: str) -> torch.Tensor:
    """Of the saved factors, `(..., out, in)`; 0 if there are none."""
    factors = load_file(directory / "adapter" / "adapter_model.safetensors")
    path, _, last = name.rpartition(".")
    for key in (f"{path}.lora_{last}_", f"{name}.lora_"):
        pair = [
            found for end in ("", ".weight") if (found := factors.get(f"base_model.model.{key}B{end}")) is not None
        ]
        if pair:
            end = "" if f"base_model.model.{key}A" in factors else ".weight"
            return 3 * pair[0].float() @ factors[f"base_model.model.{key}A{end}"].float()
    return torch.zeros(())


def merged_stack(tensors: dict[str, torch.Tensor], directory, name: str) -> torch.Tensor:
    """`(E, ...)` in the class's layout, from the tensors of single experts or of the stack."""
    if name in tensors:
        return tensors[name]
    path, _, projection = name.rpartition(".")
    base = BaseModel.open(directory / "base")
    parts = [tensors[f"{one}.weight"] for one in base.names_of_experts(path, projection)]
    num_experts = base.layouts[path].num_experts
    each = len(parts) // num_experts
    return torch.stack([torch.cat(parts[expert * each : (expert + 1) * each]) for expert in range(num_experts)])


# gpt_oss: stacks are (E, in, out)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("onto", ["quantized", "base"])
def test_every_weight_is_the_trained_one_plus_the_delta(model_type, onto, tmp_path):
    """4-bit weights come from bf16, adapted or not. 16-bit weights, and all with onto="base", are the checkpoint's."""
    model = save_trained_in_bf16(tmp_path, model_type)
    merge(tmp_path, onto=onto)
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
    layers = model.base_model.model.model.layers
    for number, layer in enumerate(layers):
        experts = layer.mlp.experts
        assert experts.is_dense == (number == 1)
        for projection in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{number}.mlp.experts.{projection}"
            added = delta(tmp_path, name)
            assert bool(added.any()) == (projection == "down_proj")
            stack = experts.stack(projection)
            if experts.is_dense or onto == "base":
                trained = merged_stack(before, tmp_path, name)
            else:
                trained = stack.decode(torch.float32)
                assert not torch.allclose(trained, merged_stack(before, tmp_path, name), atol=1e-3)
            expected = trained + (added.mT if stack.is_transposed and added.dim() else added)
            torch.testing.assert_close(merged_stack(after, tmp_path, name), expected, rtol=0, atol=1e-6)
    for name in LINEAR:
        added = delta(tmp_path, name)
        assert bool(added.any()) == name.endswith("q_proj")
        layer = model.base_model.model.get_submodule(name)
        weight = getattr(layer, "base_layer", layer).weight
        trained = before[f"{name}.weight"]
        if onto == "quantized":
            weight.quant_state.dtype = torch.float32
            trained = bnb.dequantize_4bit(weight.data, weight.quant_state)
            assert not torch.allclose(trained, before[f"{name}.weight"], atol=1e-3)
        torch.testing.assert_close(after[f"{name}.weight"], trained + added, rtol=0, atol=1e-6)


def test_expected_changes_match_nonzero_deltas(tmp_path):
    """In a fused B only the gate's rows are nonzero, and of two layers only one has a nonzero B."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = tiny_model()
    model.name_or_path = str(tmp_path / "base")
    config = MoeQLoraConfig(r=2, target_modules=["experts.gate_up_proj", "q_proj"], quant_type=None)
    model = get_peft_model(model, config).eval()
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, tensor in tensors.items():
        if key.endswith("gate_up_proj.lora_B.weight"):
            tensor[:, tensor.shape[1] // 2 :] = 0
        elif key.endswith("layers.0.self_attn.q_proj.lora_B.weight"):
            tensor.zero_()
    save_file(tensors, file, {"format": "pt"})
    report = merge(tmp_path)
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    gates = {f"model.layers.{layer}.mlp.experts.{e}.gate_proj.weight" for layer in (0, 1) for e in range(8)}
    assert changed == gates | {"model.layers.1.self_attn.q_proj.weight"}
    assert report.tensors_expected == report.tensors_changed == len(changed)
