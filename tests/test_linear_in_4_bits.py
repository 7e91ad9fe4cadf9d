"""On a CPU with AVX512-BF16, evaluation leaves 4-bit linear layers as stored, whichever way they were loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model, inject_adapter_in_model
from tiny_models import logits, randomize_adapter, tiny_model, token_ids

from peft_moe_qlora import (
    MoeQLoraConfig,
    MoeQuantizationConfig,
    QuantizedExperts,
    load_experts,
    load_quantized,
    quantize_experts,
)

pytestmark = pytest.mark.skipif(
    not has_avx512bf16(), reason="needs a CPU with AVX512-BF16: bitsandbytes repacks linear layers only there"
)
ADAPTER = {"r": 4, "target_modules": "all-linear"}


def by_bitsandbytes(path, double_quant: bool = False) -> torch.nn.Module:
    """Linear layers in 4 bits and experts in 16, as transformers loads a model without this package."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    model = get_peft_model(model, MoeQLoraConfig(**ADAPTER))
    randomize_adapter(model, std=0.05)
    return model.eval()


def loaded(path, **options) -> torch.nn.Module:
    return load_quantized(path, MoeQuantizationConfig(**options), device_map="cpu")


def quantized_in_memory(path) -> torch.nn.Module:
    model = by_bitsandbytes(path)
    quantize_experts(model, progressbar=False)
    return model


def saved_and_loaded(path) -> torch.nn.Module:
    loaded(path).save_pretrained(path / "packed")
    return transformers.AutoModelForCausalLM.from_pretrained(path / "packed", dtype=torch.bfloat16, device_map="cpu")


def injected(path) -> torch.nn.Module:
    """As transformers' `add_adapter` and `load_adapter` do."""
    return inject_adapter_in_model(MoeQLoraConfig(**ADAPTER), by_bitsandbytes(path, double_quant=True))


WAYS: dict[str, Callable] = {
    "load_quantized": loaded,
    "nested scales": lambda path: loaded(path, double_quant=True),
    "fp4": lambda path: loaded(path, quant_type="fp4"),
    "experts in 16 bits": lambda path: loaded(path, quant_type=None),
    "deepcopy": lambda path: copy.deepcopy(loaded(path)),
    "saved and loaded": saved_and_loaded,
    "quantize_experts": quantized_in_memory,
    "get_peft_model": lambda path: adapted(by_bitsandbytes(path)),
    "get_peft_model, 16 bits": lambda path: get_peft_model(by_bitsandbytes(path), MoeQLoraConfig(quant_type=None)),
    "inject_adapter_in_model": injected,
}


@pytest.fixture
def base(tmp_path):
    tiny_model(dtype=torch.bfloat16, hidden_size=128).save_pretrained(tmp_path)
    return tmp_path


def linear_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that a dequantization would give."""
    return {
        name: dequantize_4bit(module.weight.data, copy.deepcopy(module.weight.quant_state))
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_changes_no_linear_layer(way, base):
    model = WAYS[way](base)
    before = linear_weights(model)
    assert len(before) == 8
    logits(model.eval(), token_ids())
    after = linear_weights(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("take_over", [loaded, by_bitsandbytes])
@pytest.mark.parametrize("rounding", ["second-order", "nearest"])
@pytest.mark.parametrize("is_evaluated", [False, True])
def test_merging_into_4_bits(take_over, rounding, is_evaluated, base):
    """The error is 0.28 with either rounding; with repacked layers it would be 1.86."""
    model = adapted(take_over(base))
    live = logits(model.train(), token_ids()).float()  # bitsandbytes repacks nothing in training mode
    model.eval()
    if is_evaluated:
        logits(model, token_ids())
    merged = logits(model.merge_and_unload(rounding=rounding), token_ids()).float()
    assert (merged - live).abs().mean() < 0.4


def test_dequantizing_after_an_evaluation(base):
    model = loaded(base)
    live = logits(model, token_ids()).float()
    dequantized = logits(model.dequantize(torch.float32), token_ids())
    assert (dequantized - live).abs().mean() < 0.05


def test_saving_after_an_evaluation(base, tmp_path):
    model = loaded(base)
    expected = logits(model, token_ids())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_quantized(tmp_path / "saved", device_map="cpu"), token_ids()), expected)


def test_training_after_an_evaluation(base):
    def gradients(is_evaluated: bool) -> dict[str, torch.Tensor]:
        model = adapted(loaded(base))
        if is_evaluated:
            logits(model, token_ids())
        model.train()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert len(expected) == 24
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


TAKE_OVER: dict[str, Callable] = {
    "quantize_experts": lambda model, _: quantize_experts(model, progressbar=False),
    "get_peft_model": lambda model, _: get_peft_model(model, MoeQLoraConfig(**ADAPTER)),
    "load_experts": lambda model, path: load_experts(model, path, progressbar=False),
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("take_over", TAKE_OVER)
def test_repacked_layers_are_rejected(take_over, double_quant, base):
    """Before any change: experts are still in 16 bits."""
    model = by_bitsandbytes(base, double_quant)
    logits(model, token_ids())
    with pytest.raises(ValueError, match=r"has repacked model.layers.0.self_attn.q_proj.*Load the model again"):
        TAKE_OVER[take_over](model, base)
    assert not any(isinstance(module, QuantizedExperts) for module in model.modules())
    assert logits(model, token_ids()).isfinite().all()
