"""torch.compile on a CPU: values and gradients equal those of the uncompiled code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from peft import get_peft_model
from tiny_models import randomize_adapter, tiny_model
from torch._inductor import config as inductor

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.ops import ComputePath, LowRank, combine_rows, gather_rows, grouped_linear, route
from peft_moe_qlora.quantization import DenseStack, FourBitFormat, QuantizedStack
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format

STORAGES = [
    FourBitFormat(),
    FourBitFormat("fp4", double_quant=True),
    Fp8Format(),
    Fp8Format((1, 32), "e8m0"),
    Mxfp4Format(),
]
CPP_COMPILER = inductor.cpp.cxx[-1]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def results(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(tensor.any() for tensor in expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which(CPP_COMPILER) is None, reason=f"torch.compile needs {CPP_COMPILER} on a CPU")
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_decoding(storage):
    """Inductor miscompiled the decoding of partial blocks."""
    stack = QuantizedStack.from_dense(torch.randn(2, 72, 160), False, storage)

    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ stack.decode_expert(1, torch.float32).T

    x = torch.randn(3, 160, requires_grad=True)
    assert_same(results(torch.compile(product), x), results(product, x))


def test_layer_trains():
    model = get_peft_model(tiny_model(num_experts=2, num_hidden_layers=1), MoeQLoraConfig(r=2))
    randomize_adapter(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    factors = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert len(factors) == 4
    index, weights = torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.rand(3, 2)
    hidden_states = torch.randn(3, 64, requires_grad=True)

    def run(module: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        # the factors are parameters of the layer itself
        return results(lambda x, *_: module(x, index, weights), hidden_states, *factors)

    assert_same(run(torch.compile(layer, backend="aot_eager")), run(layer))


@pytest.mark.parametrize("path", ["loop", "grouped_mm"])
def test_gradients_of_every_step(path, monkeypatch):
    """Traced, without a compiler: in-place writes of a step must not lose its gradient."""
    for name in ("grouped_linear", "grouped_matmul"):
        module = import_module(f"peft_moe_qlora.ops.{name}")
        monkeypatch.setattr(module, "choose_library_path", lambda *_: ComputePath(path, ""))
        if hasattr(module, "choose_path"):
            monkeypatch.setattr(module, "choose_path", lambda *_: ComputePath(path, ""))
    index = torch.tensor([[0, 3], [4, 1], [2, 0], [5, 4]])  # 5 belongs to another rank
    stack = DenseStack(torch.randn(5, 16, 24), False)

    def step(x: torch.Tensor, weights: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        routing = route(index, 5)
        rows = grouped_linear(gather_rows(x, routing), stack, routing, low_rank=[LowRank(A, B, 0.5)])
        return combine_rows(rows, weights, routing)

    shapes = ((4, 24), (4, 2), (5, 8, 24), (5, 16, 8))
    # torch supports its grouped product for bf16 only
    dtype = torch.bfloat16 if path == "grouped_mm" else torch.float32
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    assert_same(results(torch.compile(step, backend="eager"), *inputs), results(step, *inputs))
