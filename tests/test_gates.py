"""The gates that kernels compute by formula are those of the classes themselves."""

from __future__ import annotations

import pytest
import torch
from experts_classes import ExpertsClass, build, find_experts_classes
from gate_formulas import gated

from peft_moe_qlora.experts.gates import known_gate
from peft_moe_qlora.experts.layout import read_layout
from peft_moe_qlora.ops import Gate

DECORATED = [found for found in find_experts_classes() if found.is_decorated]


@pytest.mark.parametrize("experts_class", DECORATED, ids=lambda found: found.name)
def test_known_gates_are_the_classes_own(experts_class: ExpertsClass):
    experts = build(experts_class)
    gate = known_gate(experts, read_layout(experts, "experts"))
    if isinstance(gate, str):
        assert gate, "a reason"
        return
    x = torch.randn(50, 32) * 20  # beyond every clamp
    torch.testing.assert_close(experts._apply_gate(x), gated(x, gate))


def test_most_classes_have_a_known_gate():
    experts = {found.name: build(found) for found in DECORATED}
    gates = {name: known_gate(module, read_layout(module, "experts")) for name, module in experts.items()}
    known = [name for name, gate in gates.items() if isinstance(gate, Gate)]
    assert len(known) >= 0.8 * len(gates), {name: gate for name, gate in gates.items() if name not in known}
    assert gates["GptOssExperts"].interleaved
    assert gates["Qwen3MoeExperts"] == Gate("silu")
