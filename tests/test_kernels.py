"""Each kernel against plain torch: in Triton's interpreter where there is no GPU, in fp32 either way.

The sizes are ragged on purpose: experts without rows and with rows for several tiles, ids of other ranks, features
that are no multiples of a tile or of a quantization block.
"""

from __future__ import annotations

import ctypes
import math
from functools import partial

import pytest
import torch
from gate_formulas import gated

from peft_moe_qlora.ops import Factors, Gate, LowRank, packed_weight, reference
from peft_moe_qlora.quantization import DenseStack, FourBitFormat, QuantizedStack, Stack

pytest.importorskip("triton", reason="the kernels need Triton")

from peft_moe_qlora.ops import fused_experts as fused_experts_module
from peft_moe_qlora.ops import fused_steps
from peft_moe_qlora.ops.fused_experts import fused_experts
from peft_moe_qlora.ops.fused_steps import experts_forward_by_pairs
from peft_moe_qlora.ops.kernels.code_tables import code_table
from peft_moe_qlora.ops.kernels.combine import combine
from peft_moe_qlora.ops.kernels.decode import decode
from peft_moe_qlora.ops.kernels.few_rows import fits_few_rows
from peft_moe_qlora.ops.kernels.gate import apply_gate, gate_backward
from peft_moe_qlora.ops.kernels.grouped_gemm import LowRankTerm, Rows, grouped_gemm
from peft_moe_qlora.ops.kernels.low_rank import factor_gradient, reduce_rows
from peft_moe_qlora.ops.kernels.schedule import cut_tiles, route, sort_pairs
from peft_moe_qlora.ops.kernels.tape import Tape, forget_tapes
from peft_moe_qlora.ops.kernels.tuning import SAFE_TILES, GemmTiles, choose_tiles, tuning_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-5  # relative L2 error, fp32 against fp32

NF4 = FourBitFormat("nf4", 64)
GATES = [
    Gate("silu"),
    Gate("silu", interleaved=True),
    Gate("gelu_tanh"),
    Gate("clamped_silu", limit=0.5),
    Gate("swiglu_oai", interleaved=True, limit=0.7, alpha=1.702),
    Gate("swiglu_oai", limit=0.7, alpha=1.702),
]


@pytest.fixture(autouse=True)
def no_tapes() -> None:
    forget_tapes()  # tests change tiles, which tapes don't know


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    error = relative_error(found, expected)
    assert error <= limit, f"relative error {error:.1e}"


def random_stack(shape: tuple[int, int, int], transposed: bool, storage: FourBitFormat | None) -> Stack:
    weight = torch.randn(shape, device=DEVICE) * 0.2
    return (
        DenseStack(weight, transposed) if storage is None else QuantizedStack.from_dense(weight, transposed, storage)
    )


def random_ids(num_tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    """Distinct ids per token; the first expert is never chosen, and `num_experts` is one of another rank."""
    if num_experts == 1:
        return torch.zeros(num_tokens, top_k, dtype=torch.long, device=DEVICE)
    scores = torch.rand(num_tokens, num_experts, device=DEVICE)
    return torch.topk(scores, top_k).indices + 1


@pytest.mark.parametrize("num_tokens", [1, 5, 300, 1500])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (6, 2), (129, 8)])
def test_pairs_are_sorted_stably(num_tokens: int, num_experts: int, top_k: int) -> None:
    # from -1 to E - 2: some that are no ids, and a last expert without rows
    ids = random_ids(num_tokens, top_k, num_experts) - 2
    rows = sort_pairs(ids, num_experts)
    flat = torch.where(ids.flatten() < 0, num_experts, ids.flatten())
    expected = torch.sort(flat, stable=True).indices.int()
    assert torch.equal(rows.pair_of_row, expected)
    assert torch.equal(rows.row_of_pair[expected.long()], torch.arange(flat.numel(), device=DEVICE, dtype=torch.int32))
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    assert torch.equal(rows.ends, counts.cumsum(0).int())


@pytest.mark.parametrize("heights", [(16,), (32, 16), (128, 64, 16)])
@pytest.mark.parametrize("num_tokens", [1, 60, 200])
def test_tiles_cover_every_row_once(heights: tuple[int, ...], num_tokens: int) -> None:
    ids = random_ids(num_tokens, 3, 7)
    ids[: num_tokens * 3 // 4, 0] = 2
    rows, tiles = route(ids, 7, heights)
    in_two_steps = sort_pairs(ids, 7)
    assert all(torch.equal(*parts) for parts in zip(rows[:3], in_two_steps[:3]))
    others = cut_tiles(in_two_steps, heights)
    num_tiles = others.tile_ends[-1].item()
    assert torch.equal(tiles.tile_ends, others.tile_ends)
    assert torch.equal(tiles.tiles[:, :num_tiles], others.tiles[:, :num_tiles])
    seen = torch.zeros(ids.numel(), dtype=torch.int32)
    ends = rows.ends.tolist()
    entries = tiles.tiles.T.tolist()
    assert all(expert == -1 for expert, _, _ in entries[num_tiles:])
    for expert, start, choice in entries[:num_tiles]:
        end = min(start + heights[0], ends[expert])
        assert (ends[expert - 1] if expert else 0) <= start < end <= start + heights[choice]
        assert all(end - start > height for height in heights[choice + 1 :]), "a lower tile would do"
        seen[start:end] += 1
    assert torch.equal(seen, (torch.arange(ids.numel()) < ends[-1]).int())


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 7, 5), (1, 6, 100), (5, 9, 40)], ids=str)
@pytest.mark.parametrize("storage", [NF4, FourBitFormat("fp4", 32, True), FourBitFormat("nf4", 128, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_decoding_is_bit_for_bit_that_of_the_stack(
    shape: tuple[int, int, int], storage: FourBitFormat, dtype: torch.dtype
) -> None:
    stack = random_stack(shape, False, storage)
    assert torch.equal(decode(packed_weight(stack), 0, shape[0], dtype), stack.decode(dtype))
    assert torch.equal(decode(packed_weight(stack), shape[0] - 1, 1, dtype), stack.decode(dtype)[-1:])


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [NF4, FourBitFormat("fp4", 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("height", [16, 64], ids=["scales on sums", "scales on weights"])
def test_assembly_looks_up_the_same_table_as_selects(storage: FourBitFormat, dtype: torch.dtype, height: int) -> None:
    # absmax of 1, so that codes come out as they are
    weight = torch.ones(1, 4, 64, device=DEVICE)
    weight[:, :, 1:] = torch.linspace(-1, 1, 63, device=DEVICE)
    stack = QuantizedStack.from_dense(weight, False, storage)
    assert code_table(storage.quant_type, dtype, True).assembly[0]
    eye = torch.eye(64, device=DEVICE, dtype=dtype)
    ids = torch.zeros(64, 1, dtype=torch.long, device=DEVICE)
    rows = sort_pairs(ids, 1)
    tuned = GemmTiles((height,), 16, 64, 4, 2, False, False)
    out = grouped_gemm(Rows(eye), packed_weight(stack), False, rows.ends, cut_tiles(rows, (height,)), tuned)
    assert_close(out.T, stack.decode(torch.float32)[0], 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("quant_type", "share"), [("nf4", 0.8), ("fp4", 1e-3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaled_tables_round_better_and_without_a_mean(quant_type: str, dtype: torch.dtype, share: float) -> None:
    """A mean error of the weights adds up where activations have a mean: of 4e-4 it made 1 % of an output."""
    exact = code_table(quant_type, torch.float32, False)
    rounded = code_table(quant_type, dtype, False)
    codes = torch.tensor(exact.values)
    weights = torch.randn(8192, 64)
    absmax = weights.abs().amax(1, keepdim=True)
    used = ((weights / absmax)[..., None] - codes).abs().argmin(-1)

    def errors(values: torch.Tensor) -> torch.Tensor:
        return (absmax * (values - codes)[used]).double() / (absmax * codes[used]).pow(2).mean().sqrt()

    scaled = errors(torch.tensor(rounded.values) / rounded.scale)
    assert scaled.pow(2).mean().sqrt() <= share * errors(codes.to(dtype).float()).pow(2).mean().sqrt()
    assert scaled.mean().abs() <= 3e-5


TILES = [
    GemmTiles((32, 16), 32, 64, 4, 2, weight_left=False, decode_first=False),
    GemmTiles((16,), 64, 32, 4, 2, weight_left=True, decode_first=False),
    GemmTiles((32, 16), 32, 64, 4, 2, weight_left=True, decode_first=True),
    SAFE_TILES,
]


@pytest.mark.parametrize("tuned", TILES, ids=lambda t: f"{'left' if t.weight_left else 'right'}-{t.decode_first}")
@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("shape", "storage"),
    [
        ((4, 64, 128), NF4),
        ((3, 72, 96), FourBitFormat("fp4", 32, True)),
        ((3, 70, 128), FourBitFormat("nf4", 128)),
        ((3, 40, 24), NF4),
        ((3, 7, 5), None),
    ],
    ids=str,
)
def test_grouped_product(
    tuned: GemmTiles,
    for_input_gradient: bool,
    transposed: bool,
    shape: tuple[int, int, int],
    storage: FourBitFormat | None,
) -> None:
    stack = random_stack(shape, transposed, storage)
    weight = packed_weight(stack)
    num_experts = shape[0]
    ids = random_ids(37, 2, num_experts)
    rows = sort_pairs(ids, num_experts)
    tiles = cut_tiles(rows, tuned.heights)
    matrices = stack.decode(torch.float32)
    if transposed == for_input_gradient:
        matrices = matrices.transpose(1, 2)  # now (E, K, N)
    tokens = torch.randn(37, matrices.shape[1], device=DEVICE)
    term = LowRankTerm(
        torch.randn(74, 5, device=DEVICE), torch.randn(num_experts, matrices.shape[2], 5, device=DEVICE)
    )
    bias = torch.randn(num_experts, matrices.shape[2], device=DEVICE)
    out = grouped_gemm(
        Rows(tokens, rows.pair_of_row, 2), weight, for_input_gradient, rows.ends, tiles, tuned, term, bias
    )
    num_rows = rows.ends[-1]
    expert = ids.flatten()[rows.pair_of_row.long()][:num_rows]
    x = tokens[rows.pair_of_row.long() // 2][:num_rows]
    expected = torch.einsum("sk,skn->sn", x, matrices[expert]) + bias[expert]
    expected += torch.einsum("sr,snr->sn", term.reduced[:num_rows], term.factor[expert])
    assert_close(out[:num_rows], expected)


def test_a_workspace_for_some_experts_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = random_stack((7, 32, 64), False, NF4)
    rows = sort_pairs(random_ids(40, 3, 7), 7)
    x = torch.randn(120, 64, device=DEVICE)
    tuned = GemmTiles((32, 16), 32, 32, 4, 2, weight_left=False, decode_first=True)
    arguments = (Rows(x), packed_weight(stack), False, rows.ends, cut_tiles(rows, tuned.heights), tuned)
    at_once = grouped_gemm(*arguments)
    monkeypatch.setattr("peft_moe_qlora.ops.kernels.grouped_gemm.WORKSPACE_BYTES", 3 * 32 * 64 * 4)
    in_groups = grouped_gemm(*arguments)
    assert torch.equal(at_once[: rows.ends[-1]], in_groups[: rows.ends[-1]])


@pytest.mark.parametrize("rank", [1, 16, 37])
def test_rows_down_to_the_rank_and_back(rank: int) -> None:
    num_experts, features = 5, 150
    ids = random_ids(60, 2, num_experts)
    rows = sort_pairs(ids, num_experts)
    tokens = torch.randn(60, features, device=DEVICE)
    weights = torch.rand(60, 2, device=DEVICE)
    A = torch.randn(num_experts, rank, features, device=DEVICE)
    gathered = Rows(tokens, rows.pair_of_row, 2)
    reduced = reduce_rows(gathered, A.transpose(1, 2), 0.5, rows.ends, cut_tiles(rows, (32, 16)))
    num_rows = rows.ends[-1]
    pair = rows.pair_of_row[:num_rows].long()
    expert, x = ids.flatten()[pair], tokens[pair // 2]
    assert_close(reduced[:num_rows], 0.5 * torch.einsum("sk,srk->sr", x, A[expert]))

    reduced[num_rows:] = float("nan")  # rows of no expert must not be read
    found = torch.full((num_experts, rank, features), float("nan"), device=DEVICE)
    factor_gradient(gathered, reduced, rows.ends, found.transpose(1, 2), weights=weights)
    outer = (reduced[:num_rows] * weights.flatten()[pair, None])[:, :, None] * x[:, None, :]
    expected = torch.zeros_like(found).index_add_(0, expert, outer)
    assert_close(found, expected)
    assert torch.equal(found[0], torch.zeros_like(found[0])), "an expert without rows has no gradient"


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("columns", [24, 130, 700])
def test_gates_and_their_gradients(gate: Gate, columns: int) -> None:
    ids = random_ids(9, 2, 4)
    rows = sort_pairs(ids, 4)
    num_rows = rows.ends[-1]
    x = torch.randn(18, 2 * columns, device=DEVICE, requires_grad=True)
    expected = gated(x, gate)
    assert_close(apply_gate(x.detach(), gate), expected)

    weights = torch.rand(9, 2, device=DEVICE)
    grad, row_term = torch.randn(18, columns, device=DEVICE), torch.randn(18, device=DEVICE)
    by_row = weights.flatten()[rows.pair_of_row.long(), None]
    (expected_grad,) = torch.autograd.grad(expected, x, by_row * grad)
    dots = (expected * grad).sum(1) + row_term
    dots[num_rows:] = 0
    expected_weights = torch.empty(18, device=DEVICE)
    expected_weights[rows.pair_of_row.long()] = dots
    overwritten = grad.clone()
    found, found_weights = gate_backward(x.detach(), overwritten, weights, gate, rows, row_term, keeps_value=True)
    assert_close(found, expected_grad)
    assert_close(found_weights.flatten(), expected_weights)
    assert_close(overwritten, expected)


@pytest.mark.parametrize("columns", [3, 70, 1500])
def test_combining_skips_pairs_of_other_ranks(columns: int) -> None:
    ids = random_ids(11, 3, 4)
    rows = sort_pairs(ids, 4)
    x = torch.randn(33, columns, device=DEVICE)
    x[rows.ends[-1] :] = float("nan")
    weights = torch.rand(11, 3, device=DEVICE)
    by_pair = x[rows.row_of_pair.long()].nan_to_num().view(11, 3, columns)
    assert_close(combine(x, weights, rows, 11, 3, torch.float32), (by_pair * weights[..., None]).sum(1))
    assert_close(combine(x, None, rows, 11, 3, torch.float32), by_pair.sum(1))


def run_layer(
    num_tokens: int,
    top_k: int,
    stacks: tuple[Stack, Stack],
    gate: Gate,
    rank: int,
    has_bias: bool,
    dtype: torch.dtype,
    backward: bool = True,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and all gradients of the fused layer, each beside that of plain torch in fp32."""
    up, down = stacks
    num_experts, hidden, intermediate = up.num_experts, up.in_features, down.in_features

    def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()

    ids = random_ids(num_tokens, top_k, num_experts)
    x = leaf(num_tokens, hidden, dtype=dtype)
    weights = torch.rand(num_tokens, top_k, device=DEVICE, requires_grad=True)
    factors = []
    if rank:
        shapes = ((rank, hidden), (2 * intermediate, rank), (rank, intermediate), (hidden, rank))
        factors = [leaf(num_experts, *shape, scale=0.3) for shape in shapes]
    bias = [leaf(num_experts, n, scale=0.1).detach() for n in (2 * intermediate, hidden)] if has_bias else [None, None]
    grad = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    terms = [Factors(*factors[:2], 0.7), Factors(*factors[2:], 1.3)] if rank else [None, None]
    inputs = [x, weights, *factors]
    with torch.set_grad_enabled(backward):
        out = fused_experts(x, ids, weights, packed_weight(up), packed_weight(down), gate, *terms, *bias)
    found = [out, *torch.autograd.grad(out, inputs, grad)] if backward else [out]

    x_reference = x.detach().float().requires_grad_()
    rows, expert = x_reference.repeat_interleave(top_k, 0), ids.flatten()
    low_rank = [[LowRank(*factors[:2], 0.7)], [LowRank(*factors[2:], 1.3)]] if rank else [(), ()]
    inner = gated(reference.linear(rows, expert, up, bias[0], low_rank[0]), gate)
    pairs = reference.linear(inner, expert, down, bias[1], low_rank[1]).view(num_tokens, top_k, hidden)
    expected_out = (pairs * weights[..., None]).sum(1)
    expected = [
        expected_out,
        *torch.autograd.grad(expected_out, [x_reference, *inputs[1:]], grad.float(), allow_unused=True),
    ]
    return list(zip(found, expected))


CASES = {
    # tokens, K, hidden, intermediate, E, transposed, storage, gate, rank, bias
    "plain": (5, 2, 64, 64, 4, False, NF4, Gate("silu"), 4, False),
    "no adapter": (5, 2, 128, 64, 4, True, NF4, Gate("silu"), 0, False),
    "nested, biases": (7, 2, 128, 64, 3, False, FourBitFormat("fp4", 32, True), Gate("gelu_tanh"), 3, True),
    "transposed": (7, 2, 128, 64, 3, True, FourBitFormat("nf4", 128), GATES[4], 3, True),
    "16-bit": (7, 2, 40, 24, 3, True, None, GATES[3], 3, True),
    "unaligned blocks": (7, 2, 40, 24, 3, False, NF4, GATES[1], 3, False),
    "one of each": (1, 1, 40, 24, 1, False, None, Gate("silu"), 1, False),
    "square": (6, 2, 64, 32, 3, True, NF4, Gate("silu"), 2, False),
    "many rows, high rank": (90, 4, 64, 32, 5, False, NF4, Gate("silu"), 20, False),
    "more pairs than one program sorts": (150, 2, 64, 32, 3, False, NF4, Gate("silu"), 3, False),
}


@pytest.mark.parametrize("tuned", TILES, ids=lambda t: f"{'left' if t.weight_left else 'right'}-{t.decode_first}")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layer_and_all_gradients(case: tuple, tuned: GemmTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, top_k, hidden, intermediate, num_experts, transposed, storage, gate, rank, has_bias = case

    monkeypatch.setattr(fused_steps, "choose_tiles", lambda *_: tuned)
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    stacks = tuple(
        random_stack((num_experts, *(shape[::-1] if transposed else shape)), transposed, storage) for shape in shapes
    )
    # on a GPU the second run plays the tape of the first, with other inputs and another routing
    for _ in range(2 if DEVICE.type == "cuda" else 1):
        for found, expected in run_layer(num_tokens, top_k, stacks, gate, rank, has_bias, torch.float32):
            assert_close(found, torch.zeros_like(found) if expected is None else expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("storage", [None, FourBitFormat("nf4", 64, True)], ids=["of the case", "nested"])
def test_forward_by_pairs(case: tuple, storage: FourBitFormat | None, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, top_k, hidden, intermediate, num_experts, transposed, of_case, gate, rank, has_bias = case
    if num_tokens > 10:
        pytest.skip("many tokens")
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    stacks = tuple(
        random_stack((num_experts, *(shape[::-1] if transposed else shape)), transposed, storage or of_case)
        for shape in shapes
    )
    ran = []
    monkeypatch.setattr(
        fused_experts_module, "experts_forward_by_pairs", lambda *a: ran.append(1) or experts_forward_by_pairs(*a)
    )
    for most_pairs in (0, 100):
        monkeypatch.setattr(fused_steps, "most_pairs_without_sorting", lambda *_, most_pairs=most_pairs: most_pairs)
        torch.manual_seed(3)
        found, expected = run_layer(num_tokens, top_k, stacks, gate, rank, has_bias, torch.float32, backward=False)[0]
        assert_close(found, expected)
    assert len(ran) == fits_few_rows(*map(packed_weight, stacks))


def test_a_tape_allocates_and_launches_again_with_other_inputs() -> None:
    def copy(num_bytes: int, addresses: list[int], _stream: int) -> None:
        source, target = addresses
        ctypes.memmove(target, source, num_bytes)

    first = torch.arange(8.0)
    tape = Tape([first, None])
    middle, result = torch.empty(8), torch.empty(4)
    tape.add_allocation(middle)
    tape.add_launch(partial(copy, 32), [first, middle])
    tape.add_allocation(result)
    tape.add_launch(partial(copy, 16), [middle[4:], result])
    tape.finish([result, None], "extra")
    for again in (torch.rand(8), torch.rand(8)):
        out, absent = tape.replay([again.data_ptr(), 0])
        assert torch.equal(out, again[4:])
        assert absent is None
        assert out.data_ptr() != result.data_ptr()
    with pytest.raises(ValueError, match="neither an input of the tape nor allocated on it"):
        tape.add_launch(copy, [torch.rand(3)])


@pytest.mark.gpu
def test_a_replay_is_bit_for_bit_the_first_run() -> None:
    stacks = random_stack((5, 128, 64), False, NF4), random_stack((5, 64, 64), False, FourBitFormat("fp4", 64, True))
    runs = []
    for _ in range(3):
        torch.manual_seed(2)
        runs.append([found for found, _ in run_layer(30, 2, stacks, Gate("silu"), 3, True, torch.float32)])
        run_layer(30, 2, stacks, Gate("silu"), 3, True, torch.float32)  # other inputs in between
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again))


def test_what_is_not_needed_is_not_computed() -> None:
    stacks = random_stack((3, 64, 64), False, NF4), random_stack((3, 64, 32), False, NF4)
    weights = [packed_weight(stack) for stack in stacks]
    x = torch.randn(4, 64, device=DEVICE)
    ids, top_k_weights = random_ids(4, 2, 3), torch.rand(4, 2, device=DEVICE)
    factors = [
        torch.randn(3, *shape, device=DEVICE, requires_grad=True) for shape in ((2, 64), (64, 2), (2, 32), (64, 2))
    ]
    terms = Factors(*factors[:2], 1.0), Factors(*factors[2:], 1.0)
    fused_experts(x, ids, top_k_weights, *weights, Gate("silu"), *terms).sum().backward()
    assert x.grad is None
    assert all(factor.grad is not None for factor in factors)
    frozen = [Factors(A.detach(), B.detach(), scaling) for A, B, scaling in terms]
    x.requires_grad_()
    fused_experts(x, ids, top_k_weights, *weights, Gate("silu"), *frozen).sum().backward()
    assert x.grad is not None


def test_equal_inputs_give_equal_bits() -> None:
    stacks = random_stack((3, 64, 64), False, NF4), random_stack((3, 64, 32), False, NF4)
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        runs.append([found for found, _ in run_layer(40, 2, stacks, Gate("silu"), 3, False, torch.float32)])
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 512, 4096, 16384])
@pytest.mark.parametrize("transposed", [False, True])
def test_equal_inputs_give_equal_bits_at_real_sizes(num_tokens: int, transposed: bool) -> None:
    """What a race would change; with the tiles of the table, on a busy device."""
    num_experts, hidden, intermediate, top_k = 64, 2048, 768, 8
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    weights = [
        packed_weight(random_stack((num_experts, *(shape[::-1] if transposed else shape)), transposed, NF4))
        for shape in shapes
    ]
    x, ids = torch.randn(num_tokens, hidden, device=DEVICE).bfloat16(), random_ids(num_tokens, top_k, num_experts)
    top_k_weights, grad = torch.rand(num_tokens, top_k, device=DEVICE), torch.randn_like(x)
    factors = [
        torch.randn(num_experts, *size, device=DEVICE)
        for size in ((16, hidden), (2 * intermediate, 16), (16, intermediate), (hidden, 16))
    ]
    inputs = [tensor.requires_grad_() for tensor in (x, top_k_weights, *factors)]
    runs = []
    for _ in range(8):
        terms = Factors(*factors[:2], 1.0), Factors(*factors[2:], 1.0)
        out = fused_experts(x, ids, top_k_weights, *weights, Gate("silu"), *terms)
        runs.append([out, *torch.autograd.grad(out, inputs, grad)])
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again))


def test_every_measured_table_has_an_answer_for_every_question() -> None:
    table = tuning_table((9, 0))
    for is_packed in (False, True):
        for along_columns in (False, True):
            for rows_per_expert in (1 / 512, 1.0, 33.3, 1e9):
                tiles = table.choose(is_packed, along_columns, rows_per_expert)
                sizes = (*tiles.heights, tiles.tile_n, tiles.tile_k)
                assert all(size >= 16 and math.log2(size).is_integer() for size in sizes)
                assert list(tiles.heights) == sorted(tiles.heights, reverse=True)
    assert tuning_table((1, 0)) is None


def test_unmeasured_devices_and_fp32_get_safe_tiles() -> None:
    assert choose_tiles(torch.device("cpu"), torch.bfloat16, True, True, 1.0) is SAFE_TILES
    assert choose_tiles(DEVICE, torch.float32, True, True, 1.0) is SAFE_TILES


REAL_SHAPES = {
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
    "gpt-oss-20b": (32, 2880, 2880, 4),
    "Mixtral 8x7B": (8, 4096, 1792, 2),  # an eighth of its width
}


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [NF4, FourBitFormat("fp4", 64, True), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 16, 300, 3000])
@pytest.mark.parametrize("shape", REAL_SHAPES.values(), ids=REAL_SHAPES.keys())
def test_real_shapes_in_16_bits(
    shape: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype, storage: FourBitFormat | None
) -> None:
    num_experts, hidden, intermediate, top_k = shape
    transposed = hidden == intermediate
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    stacks = []
    for rows, columns in (shape[::-1] if transposed else shape for shape in shapes):
        weight = torch.randn(num_experts, rows, columns, device=DEVICE, dtype=dtype) * 0.02
        stack = DenseStack(weight, transposed)
        stacks.append(stack if storage is None else QuantizedStack.from_dense(weight, transposed, storage))
    limit = 6e-3 if dtype == torch.bfloat16 else 1.5e-3
    for index, (found, expected) in enumerate(run_layer_by_expert(num_tokens, top_k, tuple(stacks), dtype)):
        if num_tokens > 1:
            assert_close(found, expected, limit)
        elif index != 2:
            assert_close(found, expected, 2 * limit)  # a few numbers each
        # the gradients of one token's weights are single dot products, which may cancel to nothing


def run_layer_by_expert(
    num_tokens: int, top_k: int, stacks: tuple[Stack, Stack], dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As `run_layer`, with one expert of the reference in memory at a time."""
    up, down = stacks
    num_experts, hidden, intermediate, rank = up.num_experts, up.in_features, down.in_features, 8
    shapes = ((rank, hidden), (2 * intermediate, rank), (rank, intermediate), (hidden, rank))
    factors = [(torch.randn(num_experts, *shape, device=DEVICE) * 0.02).requires_grad_() for shape in shapes]
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype).requires_grad_()
    scores, ids = torch.topk(torch.randn(num_tokens, num_experts, device=DEVICE), top_k)
    weights = torch.softmax(scores, -1).requires_grad_()
    grad = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    terms = Factors(*factors[:2], 2.0), Factors(*factors[2:], 2.0)
    out = fused_experts(x, ids, weights, packed_weight(up), packed_weight(down), Gate("silu"), *terms)
    found = [out, *torch.autograd.grad(out, [x, weights, *factors], grad)]

    inputs = [tensor.detach().float().requires_grad_() for tensor in (x, weights, *factors)]
    x, weights, A_up, B_up, A_down, B_down = inputs
    expected = torch.zeros(num_tokens, hidden, device=DEVICE)
    for expert in range(num_experts):
        token, choice = torch.where(ids == expert)
        if not token.numel():
            continue
        W_up, W_down = (stack.decode_expert(expert, torch.float32) for stack in stacks)
        if up.is_transposed:
            W_up, W_down = W_up.T, W_down.T
        inner = x[token] @ (W_up + 2 * B_up[expert] @ A_up[expert]).T
        hidden_rows = gated(inner, Gate("silu"))
        rows = hidden_rows @ (W_down + 2 * B_down[expert] @ A_down[expert]).T
        expected = expected.index_add(0, token, rows * weights[token, choice, None])
    return list(zip(found, [expected, *torch.autograd.grad(expected, inputs, grad.float())]))


@pytest.mark.gpu
def test_under_torch_compile_without_a_graph_break() -> None:
    stacks = random_stack((4, 64, 64), False, NF4), random_stack((4, 64, 32), False, NF4)
    weights = [packed_weight(stack) for stack in stacks]
    ids = random_ids(20, 2, 4)

    def layer(x: torch.Tensor, top_k_weights: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        terms = Factors(*factors[:2], 0.5), Factors(*factors[2:], 2.0)
        return fused_experts(x * 2, ids, top_k_weights, *weights, Gate("silu"), *terms) + 1

    inputs = [torch.randn(20, 64, device=DEVICE), torch.rand(20, 2, device=DEVICE)]
    inputs += [torch.randn(4, *shape, device=DEVICE) for shape in ((3, 64), (64, 3), (3, 32), (64, 3))]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    grad = torch.randn(20, 64, device=DEVICE)
    expected = layer(*inputs)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    found = torch.compile(layer, fullgraph=True)(*inputs)
    found_grads = torch.autograd.grad(found, inputs, grad)
    for a, b in zip([found, *found_grads], [expected, *expected_grads]):
        assert_close(a, b, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing_and_autocast(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    stacks = random_stack((4, 64, 64), False, NF4), random_stack((4, 64, 32), False, NF4)
    weights = [packed_weight(stack) for stack in stacks]
    ids, top_k_weights = random_ids(20, 2, 4), torch.rand(20, 2, device=DEVICE, requires_grad=True)
    x = torch.randn(20, 64, device=DEVICE, requires_grad=True)

    def layer(x: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, ids, top_k_weights, *weights, Gate("silu"))

    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain = torch.autograd.grad(layer(x, top_k_weights).sum(), [x, top_k_weights])
        again = checkpoint(layer, x, top_k_weights, use_reentrant=use_reentrant)
    again.sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(top_k_weights.grad, plain[1])


@pytest.mark.gpu
def test_capture_in_a_cuda_graph_and_replay_with_other_routing() -> None:
    stacks = random_stack((4, 64, 64), False, NF4), random_stack((4, 64, 32), False, NF4)
    weights = [packed_weight(stack) for stack in stacks]
    x, ids, top_k_weights = (
        torch.randn(600, 64, device=DEVICE),
        random_ids(600, 2, 4),
        torch.rand(600, 2, device=DEVICE),
    )
    fused_experts(x, ids, top_k_weights, *weights, Gate("silu"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_experts(x, ids, top_k_weights, *weights, Gate("silu"))
    ids.copy_(random_ids(600, 2, 4))
    ids[:400] = 3
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, fused_experts(x, ids, top_k_weights, *weights, Gate("silu")))


def layer_arguments() -> dict:
    """Arguments of a small layer that fit each other."""
    up, down = random_stack((3, 64, 64), False, NF4), random_stack((3, 64, 32), False, NF4)
    A_up, B_up, A_down, B_down = (torch.randn(3, *s, device=DEVICE) for s in ((2, 64), (64, 2), (2, 32), (64, 2)))
    return {
        "hidden_states": torch.randn(4, 64, device=DEVICE),
        "top_k_index": random_ids(4, 2, 3),
        "top_k_weights": torch.rand(4, 2, device=DEVICE),
        "up": packed_weight(up),
        "down": packed_weight(down),
        "gate": Gate("silu"),
        "up_factors": Factors(A_up, B_up, 1.0),
        "down_factors": Factors(A_down, B_down, 1.0),
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hidden_states", lambda x: x[:, :32], "hidden_states has shape"),
        ("hidden_states", lambda x: x[:3], "top_k_index has shape"),
        ("top_k_weights", lambda w: w[:, :1], "top_k_weights has shape"),
        ("up_factors", lambda f: f._replace(A=f.A[..., :32]), "factor A has shape"),
        ("down_factors", lambda f: f._replace(B=f.B[..., :1]), "factor B has shape"),
        ("up_factors", lambda f: f._replace(A=f.A[:2], B=f.B[:2]), "factor A has shape"),
        ("down", lambda w: w._replace(columns=64), "are no gated experts"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: object, message: str) -> None:
    arguments = layer_arguments()
    fused_experts(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        fused_experts(**arguments)


def test_odd_strides_are_computed_right() -> None:
    arguments = layer_arguments()
    expected = fused_experts(**arguments)
    odd = dict(arguments)
    odd["hidden_states"] = arguments["hidden_states"].T.contiguous().T
    odd["top_k_index"] = arguments["top_k_index"].T.contiguous().T
    odd["up_factors"] = arguments["up_factors"]._replace(A=arguments["up_factors"].A.mT.contiguous().mT)
    assert torch.equal(fused_experts(**odd), expected)
    bias = torch.randn(3, 64, device=DEVICE)
    with_bias = fused_experts(**arguments, down_bias=bias)
    assert torch.equal(fused_experts(**arguments, down_bias=bias.T.contiguous().T), with_bias)
    weight = torch.randn(3, 64, 64, device=DEVICE)
    stacks = DenseStack(weight, False), DenseStack(weight.mT.contiguous().mT, False)
    first, second = (fused_experts(**{**arguments, "up": packed_weight(stack)}) for stack in stacks)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["clamped_silu", "swiglu_oai"])
def test_clamped_gates_let_nan_through(kind: str) -> None:
    x = torch.full((1, 64), float("nan"), device=DEVICE)
    assert apply_gate(x, Gate(kind, limit=1.0, alpha=1.0)).isnan().all()


def test_inputs_that_share_memory_are_noticed() -> None:
    x = torch.randn(8, device=DEVICE)
    assert Tape([x, None, x]).has_overlapping_inputs()
    assert Tape([x[:4], x[3:]]).has_overlapping_inputs()
    assert not Tape([x[:4], None, x[4:]]).has_overlapping_inputs()
