"""Assumptions of trainers and other libraries about an adapter's parameters, tested without them."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from torch import nn

from peft_moe_qlora import MoeQLoraConfig, quantize_experts


def bf16_model(quant_type: str | None = "nf4") -> nn.Module:
    model = tiny_model(dtype=torch.bfloat16)
    if quant_type is not None:
        quantize_experts(model, progressbar=False)
    return model


def config(quant_type: str | None = "nf4") -> MoeQLoraConfig:
    return MoeQLoraConfig(r=4, target_modules="all-linear", quant_type=quant_type)


def test_parameter_names_contain_the_adapter_between_dots():
    model = get_peft_model(bf16_model(), config())
    model.add_adapter("other", config())
    for name, _ in model.named_parameters():
        assert ".lora_" not in name or (".default." in name) != (".other." in name), name


def test_copy_by_name_equals_the_adapter():
    """A reference model as in DPO: a second adapter, filled by the names of the first."""
    model = get_peft_model(bf16_model(), config()).eval()
    randomize_adapter(model, std=0.3)
    model.add_adapter("ref", config())
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = logits(model, token_ids())
    model.set_adapter("ref")
    assert torch.equal(logits(model, token_ids()), expected)
    with model.disable_adapter():
        assert not torch.equal(logits(model, token_ids()), expected)


@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_inactive_adapters_are_frozen_on_a_16_bit_base(quant_type, tmp_path):
    model = get_peft_model(bf16_model(quant_type), config(quant_type))
    model.add_adapter("other", config(quant_type))
    flags = {name: p.requires_grad for name, p in model.named_parameters() if ".lora_" in name}
    assert any(".experts." in name for name in flags)
    assert flags == {name: ".default." in name for name in flags}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bf16_model(quant_type), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_trained_factors_may_be_cast_by_data():
    """Trainers cast them to bf16 this way, and users back to fp32."""
    model = get_peft_model(bf16_model(), config()).train()
    for dtype in (torch.bfloat16, torch.float32):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
                parameter.grad = None
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
