"""Each kernel against plain torch: in Triton's interpreter without a GPU, in fp32 in both cases.

The sizes are deliberately ragged: experts without rows and with rows for several tiles, ids of other ranks, features
that are not multiples of a tile or of a quantization block.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gate_formulas import gated

from peft_moe_qlora.ops import Gate, packed_weight, why_not_read
from peft_moe_qlora.quantization import Format, FourBitFormat, QuantizedStack
from peft_moe_qlora.quantization.formats import Fp8Format, Int4Format, Int8Format, Nvfp4Format

pytest.importorskip("triton", reason="the kernels need Triton")

from kernel_cases import DEVICE, GATES, GRIDS, NF4, TILES, assert_close, random_ids, random_stack
from test_fused import run_layer

from peft_moe_qlora.ops import fused_steps
from peft_moe_qlora.ops.kernels.codec import decoder_of
from peft_moe_qlora.ops.kernels.combine import combine
from peft_moe_qlora.ops.kernels.decode import decode
from peft_moe_qlora.ops.kernels.gate import apply_gate, gate_backward
from peft_moe_qlora.ops.kernels.gate_low_rank import fits_one_pass, gate_backward_with_factors
from peft_moe_qlora.ops.kernels.gemm_operands import LowRankTerm, Rows
from peft_moe_qlora.ops.kernels.grouped_gemm import grouped_gemm
from peft_moe_qlora.ops.kernels.launch_recorder import allocate, forget_recordings
from peft_moe_qlora.ops.kernels.low_rank import factor_gradient, reduce_rows
from peft_moe_qlora.ops.kernels.runs import PARTS_BYTES, rows_of_a_run
from peft_moe_qlora.ops.kernels.schedule import Tiles, cut_tiles, route, sort_pairs
from peft_moe_qlora.ops.kernels.tile_table import Cut, tile_step
from peft_moe_qlora.ops.kernels.tuning import SAFE_TILES, GemmTiles, choose_tiles, tuning_table


@pytest.mark.parametrize("num_tokens", [1, 5, 300, 1500])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (6, 2), (129, 8)])
def test_pairs_are_sorted_stably(num_tokens: int, num_experts: int, top_k: int) -> None:
    # from -1 to E - 2: some are not valid ids, and the last expert has no rows
    ids = random_ids(num_tokens, top_k, num_experts) - 2
    ids[ids < 0] -= 2**40  # not a valid id either
    rows = sort_pairs(ids, num_experts)
    flat = torch.where(ids.flatten() < 0, num_experts, ids.flatten())
    expected = torch.sort(flat, stable=True).indices.int()
    assert torch.equal(rows.pair_of_row, expected)
    assert torch.equal(rows.row_of_pair[expected.long()], torch.arange(flat.numel(), device=DEVICE, dtype=torch.int32))
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    assert torch.equal(rows.ends, counts.cumsum(0).int())


@pytest.mark.parametrize("heights", [(16,), (32, 16), (128, 64, 16), (48, 32, 16), (160, 128, 32)])
@pytest.mark.parametrize("num_tokens", [1, 60, 200])
def test_tiles_cover_every_row_once(heights: tuple[int, ...], num_tokens: int) -> None:
    ids = random_ids(num_tokens, 3, 7)
    ids[: num_tokens * 3 // 4, 0] = 2
    rows, tiles = route(ids, 7, Cut(heights))
    in_two_steps = sort_pairs(ids, 7)
    assert all(torch.equal(*parts) for parts in zip(rows[:3], in_two_steps[:3]))
    others = cut_tiles(in_two_steps, Cut(heights))
    num_tiles = others.tile_ends[-1].item()
    assert torch.equal(tiles.tile_ends, others.tile_ends)
    assert torch.equal(tiles.tiles[:, :num_tiles], others.tiles[:, :num_tiles])
    seen = torch.zeros(ids.numel(), dtype=torch.int32)
    ends = rows.ends.tolist()
    entries = tiles.tiles.T.tolist()
    assert all(expert == -1 for expert, _, _ in entries[num_tiles:])
    for expert, start, choice in entries[:num_tiles]:
        end = ends[expert] if ends[expert] - start <= heights[0] else start + tile_step(heights)
        assert (ends[expert - 1] if expert else 0) <= start < end <= start + heights[choice]
        assert all(end - start > height for height in heights[choice + 1 :]), "a lower tile would suffice"
        seen[start:end] += 1
    assert torch.equal(seen, (torch.arange(ids.numel()) < ends[-1]).int())
    for highest_first in (route(ids, 7, Cut(heights, True))[1], cut_tiles(rows, Cut(heights, True))):
        assert torch.equal(highest_first.tile_ends, tiles.tile_ends)
        by_height = sorted(entries[:num_tiles], key=lambda tile: tile[2])  # stable: then by expert and row
        assert highest_first.tiles.T.tolist()[:num_tiles] == by_height
        assert (highest_first.tiles[0, num_tiles:] == -1).all()


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 7, 5), (1, 6, 100), (5, 9, 40)], ids=str)
@pytest.mark.parametrize("storage", [NF4, FourBitFormat("fp4", 32, True), FourBitFormat("nf4", 128, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_decoding_equals_the_stack_bitwise(
    shape: tuple[int, int, int], storage: FourBitFormat, dtype: torch.dtype
) -> None:
    stack = random_stack(shape, False, storage)
    assert torch.equal(decode(packed_weight(stack), 0, shape[0], dtype), stack.decode(dtype))
    assert torch.equal(decode(packed_weight(stack), shape[0] - 1, 1, dtype), stack.decode(dtype)[-1:])


@pytest.mark.parametrize("storage", [NF4, FourBitFormat("nf4", 64, True), *GRIDS], ids=str)
def test_kernels_get_parameters_instead_of_views(storage: Format) -> None:
    """Sharding moves parameters between forward and backward; a view would keep memory that was freed."""
    stack = random_stack((2, 64, 64), False, storage)
    parameters = list(stack.parameters())
    assert all(one is other for one, other in zip(packed_weight(stack).tensors, parameters, strict=True))


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 70, 192), (2, 96, 72), (1, 2, 10)], ids=str)
@pytest.mark.parametrize("storage", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_decoding_of_grid_scales_equals_the_stack_bitwise(
    shape: tuple[int, int, int], storage: Format, dtype: torch.dtype
) -> None:
    stack = random_stack(shape, False, storage, parts=2)
    assert why_not_read(stack) is None
    assert torch.equal(decode(packed_weight(stack), 0, shape[0], dtype), stack.decode(dtype))


@pytest.mark.parametrize("storage", [Fp8Format((1, 0)), Int8Format()], ids=str)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],  # the interpreter truncates
    ids=str,
)
def test_every_8_bit_code(dtype: torch.dtype, storage: Format) -> None:
    """Including subnormal FP8 codes, whose bits are subnormal in 16 bits; scales are 1, so values are exact."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 1, 256)
    codes[storage.values(codes).isnan()] = 0
    stack = QuantizedStack(torch.Size((1, 1, 256)), torch.float32, False, storage, DEVICE)
    stack.set_tensors(0, {"codes": codes[0], "block_scales": torch.ones(1, 1, device=DEVICE).view(torch.int32)})
    expected = storage.values(codes)
    assert torch.equal(decode(packed_weight(stack), 0, 1, dtype).float(), expected)
    eye = torch.eye(256, device=DEVICE, dtype=dtype)
    rows = sort_pairs(torch.zeros(256, 1, dtype=torch.long, device=DEVICE), 1)
    for height in (16, 64):
        tuned = GemmTiles((height,), 16, 64, 4, 2, False, False)
        out = grouped_gemm(Rows(eye), packed_weight(stack), False, rows.ends, cut_tiles(rows, Cut((height,))), tuned)
        assert torch.equal(out[:, 0].float(), expected[0, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [NF4, FourBitFormat("fp4", 64), Int4Format((1, 64)), Nvfp4Format()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("height", [16, 64], ids=["scales on sums", "scales on weights"])
def test_assembly_uses_the_same_table_as_selects(storage: FourBitFormat, dtype: torch.dtype, height: int) -> None:
    # absmax of 1, so codes decode to the table's values
    weight = torch.ones(1, 4, 64, device=DEVICE)
    weight[:, :, 1:] = torch.linspace(-1, 1, 63, device=DEVICE)
    stack = QuantizedStack.from_dense(weight, False, storage)
    assert decoder_of(storage.kernel_codes, dtype, True).assembly
    eye = torch.eye(64, device=DEVICE, dtype=dtype)
    ids = torch.zeros(64, 1, dtype=torch.long, device=DEVICE)
    rows = sort_pairs(ids, 1)
    tuned = GemmTiles((height,), 16, 64, 4, 2, False, False)
    out = grouped_gemm(Rows(eye), packed_weight(stack), False, rows.ends, cut_tiles(rows, Cut((height,))), tuned)
    assert_close(out.T, stack.decode(torch.float32)[0], 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("quant_type", "share"), [("nf4", 0.8), ("fp4", 1e-3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaled_tables_round_better_and_without_bias(quant_type: str, dtype: torch.dtype, share: float) -> None:
    """A mean error of the weights accumulates if activations have a mean: 4e-4 became 1 % of an output."""
    exact = decoder_of(quant_type, torch.float32, False)
    rounded = decoder_of(quant_type, dtype, False)
    codes = torch.tensor(exact.values)
    weights = torch.randn(8192, 64)
    absmax = weights.abs().amax(1, keepdim=True)
    used = ((weights / absmax)[..., None] - codes).abs().argmin(-1)

    def errors(values: torch.Tensor) -> torch.Tensor:
        return (absmax * (values - codes)[used]).double() / (absmax * codes[used]).pow(2).mean().sqrt()

    scaled = errors(torch.tensor(rounded.values) / rounded.unit)
    assert scaled.pow(2).mean().sqrt() <= share * errors(codes.to(dtype).float()).pow(2).mean().sqrt()
    assert scaled.mean().abs() <= 3e-5


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
        *(((3, 70, 192), storage) for storage in GRIDS),
        ((2, 72, 40), Fp8Format()),
    ],
    ids=str,
)
def test_grouped_product(
    tuned: GemmTiles,
    for_input_gradient: bool,
    transposed: bool,
    shape: tuple[int, int, int],
    storage: Format | None,
) -> None:
    stack = random_stack(shape, transposed, storage)
    weight = packed_weight(stack)
    num_experts = shape[0]
    ids = random_ids(37, 2, num_experts)
    rows = sort_pairs(ids, num_experts)
    tiles = cut_tiles(rows, tuned.cut)
    matrices = stack.decode(torch.float32)
    if stack.is_transposed == for_input_gradient:
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


def test_workspace_for_some_experts_gives_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = random_stack((7, 32, 64), False, NF4)
    rows = sort_pairs(random_ids(40, 3, 7), 7)
    x = torch.randn(120, 64, device=DEVICE)
    tuned = GemmTiles((32, 16), 32, 32, 4, 2, weight_left=False, decode_first=True)
    arguments = (Rows(x), packed_weight(stack), False, rows.ends, cut_tiles(rows, tuned.cut), tuned)
    at_once = grouped_gemm(*arguments)
    monkeypatch.setattr("peft_moe_qlora.ops.kernels.grouped_gemm.WORKSPACE_BYTES", 3 * 32 * 64 * 4)
    in_groups = grouped_gemm(*arguments)
    assert torch.equal(at_once[: rows.ends[-1]], in_groups[: rows.ends[-1]])


@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize(
    ("shape", "storage"),
    [
        ((3, 600, 64), NF4),
        ((2, 64, 600), FourBitFormat("nf4", 64, True)),  # blocks that extend over rows
        ((2, 600, 520), FourBitFormat("fp4", 32, True)),
        ((2, 600, 520), Fp8Format((24, 32))),
        ((2, 520, 600), Nvfp4Format()),
    ],
    ids=str,
)
def test_workspace_for_part_of_an_expert_gives_the_same_results(
    shape: tuple[int, int, int], storage: Format, for_input_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for Mixtral 8x22B, where one matrix has 384 MiB in 16 bits."""
    weight = packed_weight(random_stack(shape, False, storage))
    n, k = shape[:0:-1] if for_input_gradient else shape[1:]
    rows = sort_pairs(random_ids(20, 2, shape[0]) - 1, shape[0])
    tuned = GemmTiles((32, 16), 64, 32, 4, 2, weight_left=False, decode_first=True)
    term = LowRankTerm(torch.randn(40, 3, device=DEVICE), torch.randn(shape[0], n, 3, device=DEVICE))
    arguments = (Rows(torch.randn(40, k, device=DEVICE)), weight, for_input_gradient, rows.ends)
    arguments += (cut_tiles(rows, tuned.cut), tuned, term, torch.randn(shape[0], n, device=DEVICE))
    at_once = grouped_gemm(*arguments)
    bound = (256 if n > 256 else 64) * k * 4
    sizes = []

    def recorded(wanted: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        sizes.append(math.prod(wanted) * dtype.itemsize)
        return allocate(wanted, dtype, device)

    monkeypatch.setattr("peft_moe_qlora.ops.kernels.grouped_gemm.WORKSPACE_BYTES", bound)
    monkeypatch.setattr("peft_moe_qlora.ops.kernels.grouped_gemm.allocate", recorded)
    in_parts = grouped_gemm(*arguments)
    assert torch.equal(at_once, in_parts)
    assert max(sizes[1:]) <= bound, "the first is the result"


@pytest.mark.parametrize("heights", [(32, 16), (48, 32, 16)], ids=str)  # also tiles of two parts
@pytest.mark.parametrize("rank", [1, 16, 37])
def test_products_with_lora_factors(rank: int, heights: tuple[int, ...]) -> None:
    num_experts, features = 5, 150
    ids = random_ids(80, 2, num_experts)
    rows = sort_pairs(ids, num_experts)
    assert any(32 < count <= 48 for count in rows.ends.diff())
    tokens = torch.randn(80, features, device=DEVICE)
    weights = torch.rand(80, 2, device=DEVICE)
    A = torch.randn(num_experts, rank, features, device=DEVICE)
    gathered = Rows(tokens, rows.pair_of_row, 2)
    reduced = reduce_rows(gathered, A.transpose(1, 2), 0.5, rows.ends, cut_tiles(rows, Cut(heights)))
    num_rows = rows.ends[-1]
    pair = rows.pair_of_row[:num_rows].long()
    expert, x = ids.flatten()[pair], tokens[pair // 2]
    assert_close(reduced[:num_rows], 0.5 * torch.einsum("sk,srk->sr", x, A[expert]))

    reduced[num_rows:] = float("nan")  # rows without an expert must not be read
    found = torch.full((num_experts, rank, features), float("nan"), device=DEVICE)
    factor_gradient(gathered, reduced, rows.ends, found.transpose(1, 2), weights=weights)
    outer = (reduced[:num_rows] * weights.flatten()[pair, None])[:, :, None] * x[:, None, :]
    expected = torch.zeros_like(found).index_add_(0, expert, outer)
    assert_close(found, expected)
    assert torch.equal(found[0], torch.zeros_like(found[0])), "an expert without rows has no gradient"


@pytest.mark.parametrize("counts", [(0, 33, 1, 0, 129, 32, 64, 5), (200, 0, 0), (0, 0, 97), (31, 32, 33)], ids=str)
@pytest.mark.parametrize("is_gathered", [False, True])
@pytest.mark.parametrize("rank", [3, 16])
def test_factor_gradients_in_runs_of_rows(counts: tuple[int, ...], is_gathered: bool, rank: int) -> None:
    """Ragged experts, one with all rows, idle ones, and rows without an expert; twice with the same bits."""
    num_experts, columns = len(counts), 150
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)] + [torch.full((9,), -1)])
    ids = ids[torch.randperm(len(ids))].to(DEVICE)
    rows = sort_pairs(ids[:, None], num_experts)
    num_rows, pair = int(rows.ends[-1]), rows.pair_of_row.long()
    tokens = torch.randn(len(ids), columns, device=DEVICE)
    weights = torch.rand(len(ids), 1, device=DEVICE)
    left = Rows(tokens, rows.pair_of_row, 1) if is_gathered else Rows(tokens[pair])
    reduced = torch.randn(len(ids), rank, device=DEVICE)
    tokens[ids < 0], reduced[num_rows:] = float("nan"), float("nan")
    x, scaled = tokens[pair][:num_rows], (reduced * weights[pair])[:num_rows]
    expected = torch.zeros(num_experts, columns, rank, device=DEVICE)
    expected.index_add_(0, ids[pair][:num_rows], x[:, :, None] * scaled[:, None, :])

    def gradient(runs: Tiles | None) -> torch.Tensor:
        found = torch.full((num_experts, rank, columns), float("nan"), device=DEVICE).transpose(1, 2)
        factor_gradient(left, reduced, rows.ends, found, weights, rows.pair_of_row, runs)
        return found

    in_one_go = gradient(None)
    assert_close(in_one_go, expected)
    for length in (32, 64):
        in_runs = gradient(cut_tiles(rows, Cut((length,))))
        assert_close(in_runs, expected)
        assert torch.equal(in_runs, gradient(cut_tiles(rows, Cut((length,)))))
        is_one_run = torch.tensor(counts, device=DEVICE) <= length
        assert torch.equal(in_runs[is_one_run], in_one_go[is_one_run])


def test_layer_sums_factor_gradients_in_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(fused_steps, "rows_of_a_run", lambda *sizes: asked.append(sizes) or 32)
    forget_recordings()
    stacks = random_stack((5, 64, 64), False, NF4), random_stack((5, 64, 32), False, NF4)
    for found, expected in run_layer(90, 4, stacks, Gate("silu"), 4, False, torch.float32):
        assert_close(found, expected)
    # rows, experts, features, rank: A of down, B of up, B of down, A of up
    assert asked == [(360, 5, columns, 4) for columns in (32, 64, 64, 64)]
    asked.clear()
    forget_recordings()
    monkeypatch.setattr(fused_steps, "fits_one_pass", lambda *sizes: True)  # although it is fp32
    for found, expected in run_layer(90, 4, stacks, Gate("silu"), 4, False, torch.float32):
        assert_close(found, expected)
    # A of down and B of up together, B of down, A of up
    assert asked == [(360, 5, 32, 12), (360, 5, 64, 4), (360, 5, 64, 4)]
    forget_recordings()


def test_rows_are_split_into_runs_when_it_helps() -> None:
    # rows, experts, features, rank
    assert rows_of_a_run(512 * 8, 128, 2048, 16) is None
    assert rows_of_a_run(2048 * 8, 128, 2048, 16) == 512
    assert rows_of_a_run(4096 * 8, 128, 2048, 16) == 512
    assert rows_of_a_run(16384 * 8, 128, 2048, 16) == 2048, "even routing is not split"
    assert rows_of_a_run(4096 * 2, 8, 4096, 16) == 256, "8 experts are too few"
    assert rows_of_a_run(16, 1, 4096, 16) is None
    for num_rows, num_experts, columns, rank in itertools.product(
        (8, 4096, 131072), (1, 8, 128), (64, 7168, 32768), (1, 16, 128)
    ):
        length = rows_of_a_run(num_rows, num_experts, columns, rank)
        if length is not None:
            assert 2 * (num_rows // length + 1) * columns * rank * 4 <= PARTS_BYTES
            assert length % 16 == 0


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


@pytest.mark.parametrize(("length", "has_row_term"), [(None, False), (32, True)])
@pytest.mark.parametrize("columns", [24, 130, 300])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gradients_of_gate_and_factors_in_one_pass(
    gate: Gate, columns: int, length: int | None, has_row_term: bool
) -> None:
    """Equal those of separate kernels."""
    num_experts, down_rank, up_rank = 4, 5, 16
    # an expert with several runs, one with several steps, one without rows, and pairs of no expert
    ids = torch.tensor([0] * 70 + [1] * 33 + [3] + [-1] * 4, device=DEVICE)[torch.randperm(108, device=DEVICE)]
    # pair 0, whose weight must not reach any expert, has none
    first = int((ids < 0).nonzero()[0])
    ids[[0, first]] = ids[[first, 0]]
    rows = sort_pairs(ids.view(54, 2), num_experts)
    num_rows = int(rows.ends[-1])
    runs = None if length is None else cut_tiles(rows, Cut((length,)))
    x, grad = torch.randn(108, 2 * columns, device=DEVICE), torch.randn(108, columns, device=DEVICE)
    weights, row_term = torch.rand(54, 2, device=DEVICE), torch.randn(108, device=DEVICE)
    down_reduced, up_reduced = (torch.randn(108, rank, device=DEVICE) for rank in (down_rank, up_rank))
    for tensor in (x, grad, row_term, down_reduced, up_reduced):
        tensor[num_rows:] = float("nan")
    weights[0, 0] = float("nan")
    up_B = torch.randn(num_experts, up_rank, 2 * columns, device=DEVICE).transpose(1, 2)

    def outputs() -> list[torch.Tensor]:
        shapes = (down_rank, columns), (up_rank, 2 * columns)
        return [torch.full((num_experts, *shape), float("nan"), device=DEVICE).transpose(1, 2) for shape in shapes]

    term = row_term if has_row_term else None
    expected_A, expected_B = outputs()
    gated = grad.clone()
    expected_grad, expected_weights = gate_backward(x, gated, weights, gate, rows, term, keeps_value=True)
    factor_gradient(Rows(gated), down_reduced, rows.ends, expected_A, weights, rows.pair_of_row, runs)
    factor_gradient(Rows(expected_grad), up_reduced, rows.ends, expected_B, runs=runs)
    expected_reduced = reduce_rows(Rows(expected_grad), up_B, 0.5, rows.ends, cut_tiles(rows, Cut((32, 16))))

    found_A, found_B = outputs()
    factors = (down_reduced, up_reduced, up_B, 0.5, found_A, found_B)
    found_grad, found_weights, found_reduced = gate_backward_with_factors(
        x, grad, weights, gate, rows, term, *factors, runs
    )
    assert_close(found_grad[:num_rows], expected_grad[:num_rows])
    assert_close(found_weights, expected_weights)
    assert_close(found_reduced[:num_rows], expected_reduced[:num_rows])
    assert_close(found_A, expected_A)
    assert_close(found_B, expected_B)


def test_sizes_of_one_pass() -> None:
    x = torch.empty(4, 64, dtype=torch.bfloat16)
    assert fits_one_pass(x, 16, 1)
    assert not fits_one_pass(x, 16, 17)
    assert not fits_one_pass(x, 17, 16)
    assert not fits_one_pass(x.float(), 16, 16), "registers spill"
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    assert fits_one_pass(torch.empty(32768, 28672, **meta), 16, 16), "Mixtral 8x7B, 16,384 tokens: 238 MiB"
    assert not fits_one_pass(torch.empty(65536, 28672, **meta), 16, 16), "476 MiB"


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


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_every_table_answers_every_query(capability: tuple[int, int]) -> None:
    table = tuning_table(capability)
    is_measured = capability == (9, 0)
    assert ("not measured" in table.origin) != is_measured
    for codes in (None, "nf4", "e4m3", "e2m1", "of no entry"):
        for along_columns in (False, True):
            for rows_per_expert in (1 / 512, 1.0, 33.3, 1e9):
                tiles = table.choose(codes, along_columns, rows_per_expert)
                sizes = (*tiles.heights, tiles.tile_n, tiles.tile_k)
                assert all(size >= 16 and math.log2(size).is_integer() for size in sizes)
                assert list(tiles.heights) == sorted(tiles.heights, reverse=True)
    assert tuning_table((1, 0)) is None


def test_unmeasured_devices_and_fp32_get_safe_tiles() -> None:
    assert choose_tiles(torch.device("cpu"), torch.bfloat16, "nf4", True, 1.0) is SAFE_TILES
    assert choose_tiles(DEVICE, torch.float32, "nf4", True, 1.0) is SAFE_TILES
