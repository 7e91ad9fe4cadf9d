"""Converting experts in memory: one stack at a time; shared modules stay shared, and hooks stay in effect."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny_models import logits, randomize_adapter, tiny_model, token_ids

from peft_moe_qlora import MoeQLoraConfig, QuantizedExperts, quantize_experts
from peft_moe_qlora.experts import convert_experts
from peft_moe_qlora.quantization import QuantizedStack
from peft_moe_qlora.training import cast_trainable_to_fp32


def test_each_16_bit_stack_is_freed_before_the_next(monkeypatch):
    model = tiny_model()
    alive = weakref.WeakSet(
        parameter for name, parameter in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))
    )
    total = len(alive)
    left_at_call = []
    from_dense = QuantizedStack.from_dense.__func__

    def counting(cls, *args):
        gc.collect()
        left_at_call.append(len(alive))
        return from_dense(cls, *args)

    monkeypatch.setattr(QuantizedStack, "from_dense", classmethod(counting))
    quantize_experts(model, progressbar=False)
    assert total == 4
    assert left_at_call == [4, 3, 2, 1]
    gc.collect()
    assert len(alive) == 0


@pytest.mark.gpu
def test_peak_gpu_memory_of_converting():
    """Eight layers of 96 MiB: the peak may exceed the start by the packed stacks and one expert's temporaries."""
    model = tiny_model(
        device="cuda",
        dtype=torch.bfloat16,
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_hidden_layers=8,
        num_experts=16,
    )
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    report = quantize_experts(model, progressbar=False)
    peak = torch.cuda.max_memory_allocated() - start
    one_stack = 16 * 2 * 1024 * 1024 * 2
    assert peak <= one_stack
    gc.collect()
    saved = start - torch.cuda.memory_allocated()
    assert saved >= 0.99 * (report.dense_nbytes - report.nbytes)


def test_quantized_model_equals_its_dequantized_one(device):
    model = tiny_model(device=device)
    quantize_experts(model, progressbar=False)
    quantized = logits(model, token_ids(device))
    model.dequantize(torch.float32)
    torch.testing.assert_close(quantized, logits(model, token_ids(device)), rtol=0, atol=1e-4)


def model_with_tied_stacks() -> torch.nn.Module:
    """As in an encoder and a decoder with the same experts."""
    model = tiny_model()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    return model


def test_tied_stacks_stay_tied():
    model = model_with_tied_stacks()
    report = quantize_experts(model, progressbar=False)
    assert len(report.stacks) == 4
    for one in (model, model.to(torch.bfloat16), copy.deepcopy(model)):
        first, second = (layer.mlp.experts for layer in one.model.layers)
        assert first is not second
        for projection in ("gate_up_proj", "down_proj"):
            assert first.stack(projection).codes is second.stack(projection).codes
        assert torch.isfinite(logits(one, token_ids())).all()


def test_each_of_two_tied_stacks_is_adapted_separately():
    model = model_with_tied_stacks()
    quantize_experts(model, progressbar=False)
    base = logits(model, token_ids())
    model = get_peft_model(model, MoeQLoraConfig(r=2)).eval()
    layers = list(model.base_model.expert_layers())
    assert len(layers) == 4
    randomize_adapter(model)
    live = logits(model, token_ids())
    model.merge_adapter()
    assert len({layer.base_layer.codes.data_ptr() for layer in layers}) == 4
    model.unmerge_adapter()
    assert torch.equal(logits(model, token_ids()), live)
    merged = model.merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token_ids()), live, rtol=0, atol=1e-5 * live.abs().max().item())
    assert not torch.allclose(live, base, atol=1e-2)


def test_shared_modules_stay_shared():
    model = tiny_model()
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    quantize_experts(model, progressbar=False)
    assert isinstance(model.model.layers[0].mlp.experts, QuantizedExperts)
    assert model.model.layers[1].mlp.experts is model.model.layers[0].mlp.experts


def test_converting_twice_keeps_the_bytes():
    model = tiny_model()
    quantize_experts(model, progressbar=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_experts(model, progressbar=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_accelerate_hook_moves_to_the_replacement():
    """Dispatched models have hooks that move inputs to the device of a module."""
    from accelerate import dispatch_model

    model = tiny_model()
    expected = logits(model, token_ids())
    device_map = {name: "cpu" for name, _ in model.named_children()}
    dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    hook = model.model.layers[0].mlp.experts._hf_hook
    convert_experts(model, None)
    experts = model.model.layers[0].mlp.experts
    assert experts._hf_hook is hook
    assert not hasattr(experts.original, "_hf_hook")
    torch.testing.assert_close(logits(model, token_ids()), expected)


def test_casting_and_moving_after_quantizing(device):
    model = tiny_model()
    quantize_experts(model, progressbar=False)
    model.to(device, torch.bfloat16)
    assert logits(model, token_ids(device)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_trainable_factors_are_cast_to_fp32(dtype):
    """A head trained in full gets the dtype of the base, since it does not cast its inputs."""
    config = MoeQLoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model(dtype=dtype), config)
    randomize_adapter(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lm_head.modules_to_save" in name for name in trained)
    cast_trainable_to_fp32(model)
    for name, parameter in model.named_parameters():
        is_cast = name in trained and ("lora_" in name or dtype == torch.float32)
        expected = before[name].float() if is_cast else before[name]
        assert parameter.dtype == expected.dtype
        assert torch.equal(parameter, expected)
    assert torch.isfinite(logits(model, token_ids())).all()
    assert torch.isfinite(logits(model.merge_and_unload(), token_ids())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_get_the_dtype_of_the_base(bias, dtype):
    """gpt-oss's attention has biases, which are added without a cast."""
    config = MoeQLoraConfig(r=2, target_modules=["q_proj", "v_proj", "experts"], bias=bias)
    model = get_peft_model(tiny_model("gpt_oss", dtype=dtype), config)
    biases = [one for name, one in model.named_parameters() if name.endswith(("base_layer.bias", "proj_bias"))]
    assert biases
    assert all(one.requires_grad for one in biases)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    cast_trainable_to_fp32(model)
    assert {one.dtype for one in biases} == {dtype}
    assert all(one.dtype == torch.float32 for name, one in model.named_parameters() if "lora_" in name)
    with model.disable_adapter():
        assert torch.isfinite(logits(model, token_ids())).all()


@pytest.mark.parametrize(
    ("is_sharded", "message"),
    [
        (True, r"is sharded over processes by ZeRO-3.* before train\(\)"),
        (False, r"has a gradient .* before train\(\)"),
    ],
)
def test_factors_that_are_not_cast(is_sharded, message):
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), MoeQLoraConfig(r=2), autocast_adapter_dtype=False)
    factor = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    if is_sharded:
        factor.ds_status = SimpleNamespace(name="NOT_AVAILABLE")  # as DeepSpeed marks them
    else:
        factor.grad = torch.zeros_like(factor)
    with pytest.raises(ValueError, match=message):
        cast_trainable_to_fp32(model)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}
