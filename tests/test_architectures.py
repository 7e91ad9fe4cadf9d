"""Experts classes with a nonstandard call give the same results as in transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model
from shrunken_models import shrunken_config
from tiny_models import logits, randomize_adapter, token_ids
from torch import nn

from peft_moe_qlora import MoeQLoraConfig, quantize_experts
from peft_moe_qlora.experts import convert_experts


def llama4(device: str = "cpu", num_experts: int = 4) -> nn.Module:
    config = shrunken_config("llama4_text")
    config.num_local_experts = num_experts
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).to(device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    names = ("embed_tokens.weight", "router.weight", "layers.0.self_attn.q_proj.weight")
    parameters = {name: p for name, p in model.named_parameters() if name.endswith(names)}
    loss = model(input_ids=ids).logits.float().square().sum()
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))


@pytest.mark.parametrize("num_experts", [2, 5])
def test_llama_4_in_floating_point(num_experts, device):
    model, ids = llama4(device, num_experts), token_ids(device)
    expected, expected_gradients = logits(model, ids), gradients(model, ids)
    convert_experts(model, None)
    torch.testing.assert_close(logits(model, ids), expected)
    found = gradients(model, ids)
    assert found.keys() == expected_gradients.keys()
    assert len(found) == 4
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-4)


def test_llama_4_learns_merges_and_saves(device, tmp_path):
    model, ids = llama4(device), token_ids(device)
    quantize_experts(model, progressbar=False)
    base = logits(model, ids)
    model = get_peft_model(model, MoeQLoraConfig(r=4, target_modules="all-linear"))
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    randomize_adapter(model, std=0.05)
    live = logits(model, ids)
    assert (live - base).norm() > 1e-2 * base.norm()
    merged = model.merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), live, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path)
    again = transformers.Llama4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map=device).eval()
    assert torch.equal(logits(again, ids), logits(merged, ids))


def test_mixed_batch_is_rejected(device):
    model = get_peft_model(llama4(device), MoeQLoraConfig(r=4)).eval()
    with pytest.raises(ValueError, match="adapter_names is not supported for Llama4TextExperts"):
        model(input_ids=token_ids(device), adapter_names=["default", "__base__"])
