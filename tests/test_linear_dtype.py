"""Linear layers stay in 16 bits if their module casts activations to the dtype of their weights."""

from __future__ import annotations

import torch
from shrunken_models import shrunken_model_or_skip
from tiny_models import logits
from torch import nn

from peft_moe_qlora import MoeQuantizationConfig, load_quantized
from peft_moe_qlora.loading.linear import asked_for_dtype


class CastsToWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.to(self.first.weight.dtype)))


def test_modules_that_read_the_weight_dtype_are_found():
    assert asked_for_dtype(nn.Sequential(CastsToWeights(), nn.Linear(4, 4))) == ["0.first"]


def test_activations_are_not_cast_to_integers(tmp_path):
    """A 4-bit layer would cause this, since its weights are uint8."""
    model = shrunken_model_or_skip("inkling2_loop_text", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    quantized = load_quantized(tmp_path, MoeQuantizationConfig(), device_map="cpu", dtype=torch.float32)
    gates = {name: module for name, module in quantized.named_modules() if name.endswith("message_gate")}
    assert gates
    assert all(type(gate.down_proj) is nn.Linear for gate in gates.values())
    x, message = torch.rand(2, 2, 3, model.config.get_text_config().hidden_size).unbind()
    with torch.no_grad():
        for name, gate in gates.items():
            expected = model.get_submodule(name)(x, message) - x
            assert (gate(x, message) - x - expected).norm() < 0.2 * expected.norm()  # two layers are in 4 bits
    assert torch.isfinite(logits(quantized, torch.arange(3, 12)[None])).all()
