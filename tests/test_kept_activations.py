"""Keeping the experts' activations through a recomputation: the same results, and no product computed twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from peft_moe_qlora.ops import Factors, Gate, keep_experts, kept_nbytes, packed_weight, with_backward

pytest.importorskip("triton", reason="the kernels need Triton")

from calling_backend import CallingBackend
from kernel_cases import DEVICE, NF4, random_ids, random_stack

from peft_moe_qlora.ops import fused_experts as layer_of_experts
from peft_moe_qlora.ops import fused_steps
from peft_moe_qlora.ops.fused_experts import fused_experts
from peft_moe_qlora.ops.fused_op import experts_op
from peft_moe_qlora.ops.kernels.launch_recorder import forget_recordings
from peft_moe_qlora.training.cuda_graphs import CapturedLayer, CudaBackend, read_call
from peft_moe_qlora.training.static_tensors import StaticTensors

E, T, K, H, WIDTH, R = 3, 6, 2, 64, 32, 2


def as_operator(*arguments: object) -> torch.Tensor:
    return experts_op(*arguments[:5], *arguments[6:8], None, None, arguments[5], False)


@pytest.fixture
def layers() -> list[tuple]:
    """Two successive layers of experts, as in one checkpointed region."""

    def factors(out: int, size: int) -> Factors:
        return Factors(
            *(torch.randn(E, *shape, device=DEVICE).requires_grad_() for shape in ((R, size), (out, R))), 0.5
        )

    return [
        (
            packed_weight(random_stack((E, 2 * WIDTH, H), False, NF4)),
            packed_weight(random_stack((E, H, WIDTH), False, NF4)),
            Gate("silu"),
            factors(2 * WIDTH, H),
            factors(H, WIDTH),
        )
        for _ in range(2)
    ]


def test_forward_without_autograd_as_for_a_backward(layers: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_of_experts, "goes_by_gemv", lambda *_: True)
    monkeypatch.setattr(layer_of_experts, "_forward_gemv", lambda *_: "few tokens")
    inputs = (torch.randn(T, H, device=DEVICE), random_ids(T, K, E), torch.rand(T, K, device=DEVICE))
    expected = fused_experts(*inputs, *layers[0])
    with torch.no_grad():
        with with_backward():
            found = fused_experts(*inputs, *layers[0])
        assert fused_experts(*inputs, *layers[0]) == "few tokens"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("function", [fused_experts, as_operator])
def test_products_are_computed_once(function: Callable, layers: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    forget_recordings()
    ids, weights = random_ids(T, K, E), torch.rand(T, K, device=DEVICE)
    products = []
    product = fused_steps._product
    monkeypatch.setattr(fused_steps, "_product", lambda *args, **kw: products.append(1) or product(*args, **kw))

    def region(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = x + function(x, ids, weights, *layer).tanh()
        return x

    def run(context_fn: Callable) -> list[torch.Tensor]:
        forget_recordings()
        products.clear()
        torch.manual_seed(1)
        x = torch.randn(T, H, device=DEVICE, requires_grad=True)
        out = checkpoint(region, x, use_reentrant=False, context_fn=context_fn)
        trained = [x, *[factor for layer in layers for pair in layer[3:] for factor in pair[:2]]]
        first = torch.autograd.grad(out.square().sum(), trained, retain_graph=True)
        again = torch.autograd.grad(out.square().sum(), trained)
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        return [out.detach(), *first]

    expected = run(noop_context_fn)
    num_recomputed = len(products)
    found = run(keep_experts)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(tensor.any() for tensor in found)
    if DEVICE.type == "cpu":  # a replayed recording on a GPU launches kernels without Python calls
        forwards, backwards = 2 * 2, 2 * 2 * 2
        assert num_recomputed == 3 * forwards + backwards
        assert len(products) == forwards + backwards


def test_nbytes_of_kept_activations(layers: list[tuple]) -> None:
    """Plus the tiles, which are small."""
    forward, _ = keep_experts()
    ids, weights = random_ids(T, K, E), torch.rand(T, K, device=DEVICE)
    x = torch.randn(T, H, device=DEVICE, requires_grad=True)
    with forward:
        fused_experts(x, ids, weights, *layers[0])
    out, tensors, _ = forward.region.kept[0]
    gate_input, up_reduced, down_reduced, routing, *tiles = tensors
    halves = (out.nbytes + gate_input.nbytes + up_reduced.nbytes + down_reduced.nbytes) // 2  # as if in 16 bits
    assert kept_nbytes(T, K, H, 2 * WIDTH, R) == halves + 2 * 4 * T * K
    assert 0 <= routing.nbytes - 2 * 4 * T * K <= 4 * (E + 8)
    assert sum(one.nbytes for one in tiles) <= 2 * 4 * (E + 3 * (T * K + E))


class Block(nn.Module):
    """A decoder layer of experts only, whose output may be needed by the backward."""

    def __init__(self, function: Callable, layer: tuple, is_read: bool) -> None:
        super().__init__()
        self.function, self.is_read = function, is_read
        self.frozen, scalings = layer[:3], [pair.scaling for pair in layer[3:]]
        self.factors = nn.ParameterList([factor.detach() for pair in layer[3:] for factor in pair[:2]])
        self.scalings = scalings
        self.ids, self.weights = random_ids(T, K, E), torch.rand(T, K, device=DEVICE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = [Factors(*self.factors[2 * i : 2 * i + 2], scaling) for i, scaling in enumerate(self.scalings)]
        out = self.function(x, self.ids, self.weights, *self.frozen, *pairs)
        return x + (out.tanh() if self.is_read else out)


@pytest.mark.parametrize("keep", ["nothing", "experts"])
@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("function", [fused_experts, as_operator])
def test_unused_output_is_not_recomputed(
    function: Callable, is_read: bool, keep: str, layers: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is captured, and analyzed for this."""
    forget_recordings()
    block = Block(function, layers[0], is_read)
    products = []
    product = fused_steps._product
    monkeypatch.setattr(fused_steps, "_product", lambda *args, **kw: products.append(1) or product(*args, **kw))
    backend = CallingBackend if DEVICE.type == "cpu" else CudaBackend
    static = StaticTensors()

    def grads(run: Callable, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        out = run(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *block.factors])]

    example = torch.randn(T, H, device=DEVICE)
    captured = CapturedLayer(block, block, read_call((example,), {}), static, backend(example.device), keep)
    for _ in range(2):
        x = torch.randn(T, H, device=DEVICE)
        expected = grads(block, x)
        products.clear()
        found = grads(lambda x: captured(read_call((x,), {})), x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        if DEVICE.type == "cpu":
            recomputed = 0 if keep == "experts" else 2 if is_read else 1
            assert len(products) == 2 + recomputed + 2
