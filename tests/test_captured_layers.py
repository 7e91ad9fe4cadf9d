"""What single captured layers compute, outside of models; operators that are called again replace graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calling_backend import RecordingBackend
from torch import nn
from torch.nn import functional as F

from peft_moe_qlora.training import layer_graphs
from peft_moe_qlora.training.cuda_graphs import CudaBackend
from peft_moe_qlora.training.layer_graphs import LayerGraphs

KEEPS = ["nothing", "everything"]


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout = 0.0
        self.scaling = 1.0

    def forward(self, hidden_states: torch.Tensor, kind: str = "") -> torch.Tensor:
        changes = F.dropout(self.linear(hidden_states), self.attention_dropout, self.training)
        return hidden_states + self.scaling * self.dropout(changes)


def graphs_for(device: str, keep: str = "nothing") -> LayerGraphs:
    return LayerGraphs(keep, CudaBackend if device == "cuda" else RecordingBackend)


def step(
    layer: nn.Module,
    number: int,
    graphs: LayerGraphs | None,
    length: int = 3,
    dtype: torch.dtype = torch.float32,
    **rest,
) -> list[torch.Tensor]:
    """Output and gradients of a step, whose numbers are drawn from a seed."""
    device = next(layer.parameters()).device
    torch.manual_seed(number)
    hidden_states = torch.randn(2, length, 4).to(device, dtype).requires_grad_()
    layer.zero_grad()
    out = (
        layer(hidden_states, **rest)
        if graphs is None
        else graphs.run(layer, layer.forward, layer.forward, (hidden_states,), rest)
    )
    (out * torch.arange(1, 5, device=device)).sum().backward()
    return [out.detach(), hidden_states.grad, *[parameter.grad.clone() for parameter in layer.parameters()]]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


@pytest.mark.parametrize("keep", KEEPS)
def test_output_of_another_dtype(device, keep):
    """As with norms in fp32 in a model in bf16."""
    layer, graphs = Scaled().to(device), graphs_for(device, keep)
    for number in range(4):
        found = step(layer, number, graphs, dtype=torch.bfloat16)
        assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.float32]
        torch.testing.assert_close(found, step(layer, number, None, dtype=torch.bfloat16), rtol=0, atol=0)
    assert graphs.report() == ["1 graphs of layers, for 1 input shapes"]


CHANGES: dict[str, Callable[[Layer], object]] = {
    "no dropout": lambda layer: setattr(layer.dropout, "p", 0.0),
    "more dropout": lambda layer: setattr(layer.dropout, "p", 0.8),
    "dropout in evaluation": lambda layer: layer.dropout.eval(),
    "dropout of a function": lambda layer: setattr(layer, "attention_dropout", 0.5),
    "a constant": lambda layer: setattr(layer, "scaling", 2),
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_constants_that_change_after_the_capture(device, keep, dropout, change):
    layer, graphs = Layer(dropout).to(device), graphs_for(device, keep)
    for number in range(3):
        step(layer, number, graphs)
    before = step(layer, 3, graphs)
    torch.testing.assert_close(before, step(layer, 3, None), rtol=0, atol=1e-6)
    change(layer)
    for number in range(3, 6):
        torch.testing.assert_close(step(layer, number, graphs), step(layer, number, None), rtol=0, atol=1e-6)
    has_changed = dropout > 0 or change is not CHANGES["no dropout"]
    assert graphs.report() == [f"{1 + has_changed} graphs of layers, for 1 input shapes"]


def test_captures_that_were_replayed_are_not_counted(device):
    """Merging moves weights in 4 bits, for example."""
    layer, graphs = Layer().to(device), graphs_for(device)
    for number in range(3 * (layer_graphs.MOST_CAPTURES + 2)):
        if number % 3 == 0:
            layer.linear.weight.data = layer.linear.weight.data.clone()
        found = step(layer, number, graphs)
        torch.testing.assert_close(found, step(layer, number, None), rtol=0, atol=1e-6)
    assert graphs.report() == ["1 graphs of layers, for 1 input shapes"]
    for number in range(layer_graphs.MOST_CAPTURES + 2):
        layer.linear.weight.data = layer.linear.weight.data.clone()
        step(layer, number, graphs)
    assert "changed too often" in graphs.report()[1]


def test_each_layer_has_its_own_number_of_shapes(device, monkeypatch):
    """Layers of one model may have different arguments."""
    monkeypatch.setattr(layer_graphs, "MOST_SHAPES", 2)
    graphs, layers = graphs_for(device), [Layer().to(device), Layer().to(device)]
    for length in (3, 3, 5, 5):
        for kind, layer in enumerate(layers):
            step(layer, 0, graphs, length, kind=str(kind))
    assert graphs.report() == ["4 graphs of layers, for 2 input shapes"]
    for _ in range(2):
        step(layers[0], 0, graphs, 7)
    assert "2 input shapes are captured already" in graphs.report()[1]
