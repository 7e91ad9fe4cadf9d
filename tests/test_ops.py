"""Routing and grouped products compared with plain torch: values, all gradients, ragged groups, both paths."""

from __future__ import annotations

import pytest
import torch

from peft_moe_qlora.ops import LowRank, choose_path, combine_rows, gather_rows, grouped_linear, reference, route
from peft_moe_qlora.ops.dispatch import choose_library_path
from peft_moe_qlora.quantization import DenseStack, FourBitFormat, QuantizedStack

E, K, IN, OUT = 5, 2, 24, 16

# dtype -> largest relative L2 error; bf16 rounds operands and results to 8 bits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}

ROUTINGS = {
    "random": torch.tensor([[0, 3], [4, 1], [2, 0], [3, 4], [1, 2], [0, 4], [3, 1]]),
    "idle experts": torch.tensor([[0, 3], [3, 0], [0, 3]]),
    "all to one": torch.tensor([[2, 2], [2, 2], [2, 2], [2, 2]]),
    "one token": torch.tensor([[4, 1]]),
    "no token": torch.empty(0, 2, dtype=torch.long),
    "experts of other ranks": torch.tensor([[0, 5], [5, 5], [4, 2], [5, 1]]),
    "ids out of range": torch.tensor([[0, 7], [-1, 5], [4, 2]]),
}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    norm = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / norm if norm else found.abs().sum().item()


@pytest.mark.parametrize("index", ROUTINGS.values(), ids=ROUTINGS)
def test_routing_invariants(index, device):
    index = index.to(device)
    routing = route(index, E)
    T = index.shape[0]
    assert sorted(routing.row_of_pair.flatten().tolist()) == list(range(T * K))
    start = 0
    for expert, end in enumerate(routing.offsets.tolist()):
        assert end - start == (index == expert).sum()
        assert (routing.expert_of_row[start:end] == expert).all()
        start = end
    for token in range(T):
        for choice in range(K):
            row = routing.row_of_pair[token, choice]
            assert routing.token_of_row[row] == token
            if routing.is_routed[token, choice]:
                assert routing.expert_of_row[row] == index[token, choice]
            else:
                assert row >= routing.offsets[-1]
    assert routing.is_routed.sum() == routing.offsets[-1]


@pytest.mark.parametrize("index", ROUTINGS.values(), ids=ROUTINGS)
def test_gathering_and_combining(index, device):
    """Compared with plain indexing under autograd; the gradient of a weight that is not computed here is zero."""
    index = index.to(device)
    routing = route(index, E)
    T = index.shape[0]
    x = torch.randn(T, IN, device=device, requires_grad=True)
    weights = torch.rand(T, K, device=device, requires_grad=True)
    found = combine_rows(gather_rows(x, routing) * 3, weights, routing)
    is_here = (index >= 0) & (index < E)
    expected = (3 * x[:, None, :] * (weights * is_here)[..., None]).sum(1)
    cotangent = torch.randn_like(expected)
    assert relative_error(found, expected) <= 1e-6
    expected_grads = torch.autograd.grad(expected, (x, weights), cotangent)
    for grad, expected_grad in zip(torch.autograd.grad(found, (x, weights), cotangent), expected_grads):
        assert relative_error(grad, expected_grad) <= 1e-6
    assert (expected_grads[1][~is_here] == 0).all()


def make_terms(ranks: list[int], device: str, dtype: torch.dtype) -> list[LowRank]:
    def factor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) / 4).to(dtype).requires_grad_()

    return [LowRank(factor(E, r, IN), factor(E, OUT, r), scaling=0.5 + r) for r in ranks]


def make_stack(storage: FourBitFormat | None, is_transposed: bool, device: str, dtype: torch.dtype):
    shape = (E, IN, OUT) if is_transposed else (E, OUT, IN)
    weight = torch.randn(shape, device=device).to(dtype)
    if storage is None:
        return DenseStack(weight, is_transposed)
    return QuantizedStack.from_dense(weight, is_transposed, storage)


@pytest.mark.parametrize("index", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("storage", [None, FourBitFormat("nf4", 64)], ids=str)
@pytest.mark.parametrize("ranks", [[], [1], [8], [3, 16]], ids=str)
def test_grouped_linear_matches_plain_torch(index, dtype, is_transposed, storage, ranks, device):
    """In fp32 on the same numbers; for 16 bits the reference is fp32 on the rounded inputs."""
    routing = route(index.to(device), E)
    stack = make_stack(storage, is_transposed, device, dtype)
    terms = make_terms(ranks, device, torch.float32)
    bias = torch.randn(E, OUT, device=device, requires_grad=True)
    rows = torch.randn(routing.num_rows, IN, device=device).to(dtype).requires_grad_()
    is_tail = torch.arange(routing.num_rows, device=device) >= routing.offsets[-1]
    expert_of_row = torch.where(is_tail, E, routing.expert_of_row)
    inputs = [rows, bias, *(factor for term in terms for factor in (term.A, term.B))]

    found = grouped_linear(rows, stack, routing, bias, terms)
    found = found.masked_fill(is_tail[:, None], 0)  # a bias is added to them too; nothing reads them
    twin_stack = DenseStack(stack.decode(dtype).float(), is_transposed)
    expected = reference.linear(rows.float(), expert_of_row, twin_stack, bias, terms)
    assert found.dtype == dtype
    assert relative_error(found, expected) <= TOLERANCE[dtype]

    cotangent = torch.randn_like(expected).to(dtype)
    expected_grads = torch.autograd.grad(expected, inputs, cotangent.float())
    for grad, expected_grad in zip(torch.autograd.grad(found, inputs, cotangent), expected_grads):
        assert grad.shape == expected_grad.shape
        assert relative_error(grad, expected_grad) <= TOLERANCE[dtype]


def test_comparison_detects_a_small_fault():
    """One expert's weight is off by 2 %."""
    routing = route(ROUTINGS["random"], E)
    stack = make_stack(None, False, "cpu", torch.float32)
    rows = torch.randn(routing.num_rows, IN)
    found = grouped_linear(rows, stack, routing)
    stack.weight[2] *= 1.02
    assert relative_error(found, reference.linear(rows, routing.expert_of_row, stack)) > TOLERANCE[torch.float32]


def test_token_mask_excludes_tokens_from_a_term():
    routing = route(ROUTINGS["random"], E)
    stack = make_stack(None, False, "cpu", torch.float32)
    (term,) = make_terms([4], "cpu", torch.float32)
    mask = torch.tensor([True, False, True, False, False, True, False])
    rows = torch.randn(routing.num_rows, IN)
    masked = LowRank(term.A, term.B, term.scaling, token_mask=mask)
    found = grouped_linear(rows, stack, routing, low_rank=[masked])
    is_on = mask[routing.token_of_row]
    assert torch.allclose(found[is_on], grouped_linear(rows, stack, routing, low_rank=[term])[is_on], atol=1e-5)
    assert torch.equal(found[~is_on], grouped_linear(rows, stack, routing)[~is_on])


def test_no_dense_stack_is_saved_for_backward():
    """Between forward and backward only routed rows and factors are kept, never a decoded stack."""
    routing = route(ROUTINGS["random"], E)
    stack = make_stack(FourBitFormat(), False, "cpu", torch.float32)
    rows = torch.randn(routing.num_rows, IN, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        grouped_linear(rows, stack, routing, low_rank=make_terms([4], "cpu", torch.float32))
    assert saved
    assert not [shape for shape in saved if torch.Size(shape).numel() >= E * IN * OUT]


@pytest.mark.gpu
def test_gpu_uses_kernels_for_frozen_weights():
    device = torch.device("cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert choose_path(device, dtype, 60, 64).name == "triton"
    assert choose_path(device, torch.float64, 64, 64).name == "loop"


@pytest.mark.gpu
def test_gpu_uses_the_grouped_product_for_bf16_factors_only():
    device = torch.device("cuda")
    assert choose_library_path(device, torch.bfloat16, 64, 64).name == "grouped_mm"
    assert choose_library_path(device, torch.float32, 64, 64).name == "loop"
    assert choose_library_path(device, torch.bfloat16, 60, 64).name == "loop"


def test_cpu_uses_the_loop():
    assert choose_path(torch.device("cpu"), torch.bfloat16, 64, 64).name == "loop"
