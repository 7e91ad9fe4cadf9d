"""Backward of the gate together with the low-rank products of its results, which would each read them again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..operands import Gate
from .gate import gate_derivatives, load_gate_inputs, store_gate_inputs
from .gemm_operands import padded_rank
from .launch import cdiv, has_much_shared_memory, launch
from .launch_recorder import allocate
from .runs import parts_of_runs, run_of_expert, store_gradient, sum_runs
from .schedule import RoutedRows, Tiles


@triton.jit
def _features(first_column, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the gate's result, and the features of gate and up that they are computed from."""
    column = first_column + tl.arange(0, WIDTH)
    if INTERLEAVED:
        return column, 2 * column, 2 * column + 1
    return column, column, column + COLUMNS


@triton.jit
def _load_factor(FACTOR, feature, is_feature, RANK: tl.constexpr, RANKS: tl.constexpr, STRIDES: tl.constexpr):
    """`(RANKS, features)` of one expert's factor with strides `(_, feature, rank)`."""
    r = tl.arange(0, RANKS)
    place = FACTOR + feature[None, :] * STRIDES[1] + r[:, None] * STRIDES[2]
    return tl.load(place, mask=(r < RANK)[:, None] & is_feature[None, :], other=0.0)


@triton.jit
def _load_reduced(REDUCED, index, is_row, RANK: tl.constexpr, RANKS: tl.constexpr):
    """`(RANKS, rows)` of `REDUCED (rows, RANK)`."""
    r = tl.arange(0, RANKS)
    return tl.load(REDUCED + index[None, :] * RANK + r[:, None], mask=(r < RANK)[:, None] & is_row[None, :], other=0.0)


@triton.jit
def _gradients_of_block(
    x,
    grad,
    out,
    first_column,
    index,
    is_row,
    weight,
    limit,
    alpha,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stores the gradients of gate and up.

    `x` and `out` point to rows of `2 * COLUMNS`, `grad` to rows of `COLUMNS`.

    Returns:
        Weighted value, gradients of gate and up, all `(rows, WIDTH)`, and `(rows,)` sums of value times `grad`.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    gate, up = load_gate_inputs(x, index, is_row, first_column, COLUMNS, index.shape[0], WIDTH, INTERLEAVED)
    column = first_column + tl.arange(0, WIDTH)
    is_there = is_row[:, None] & (column < COLUMNS)[None, :]
    grads = tl.load(grad + index[:, None] * COLUMNS + column[None, :], mask=is_there, other=0.0).to(tl.float32)
    value, by_gate, by_up = gate_derivatives(gate, up, limit, alpha, KIND)
    dots = tl.sum(value * grads, 1)
    grads *= weight[:, None]
    by_gate = (by_gate * grads).to(DTYPE)
    by_up = (by_up * grads).to(DTYPE)
    store_gate_inputs(out, index, is_row, first_column, by_gate, by_up, COLUMNS, index.shape[0], WIDTH, INTERLEAVED)
    # with the weights on the other operand of its product, Triton would compute the value twice, in two layouts
    return (value * weight[:, None]).to(DTYPE), by_gate, by_up, dots


@triton.jit(do_not_specialize=["bound", "half", "num_rows", "limit", "alpha"])
def _gate_factors_kernel(
    X,
    GRAD,
    WEIGHTS,
    PAIR_OF_ROW,
    DOWN_REDUCED,
    UP_REDUCED,
    UP_B,
    ENDS,
    RUNS,
    OUT,
    GRAD_DOWN_A,
    GRAD_UP_B,
    DOWN_PARTS,
    UP_PARTS,
    REDUCED_PARTS,
    WEIGHT_PARTS,
    bound,
    half,
    num_rows,
    limit,
    alpha,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    DOWN_RANKS: tl.constexpr,
    DOWN_STRIDES: tl.constexpr,
    UP_RANK: tl.constexpr,
    UP_RANKS: tl.constexpr,
    UP_STRIDES: tl.constexpr,
    GRAD_UP_STRIDES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Grid: pairs of blocks of `WIDTH` columns; experts, or runs of up to `LENGTH` rows of one expert.

    X and OUT `(S, 2 COLUMNS)`, GRAD `(S, COLUMNS)`, REDUCED_PARTS `(programs of columns, S, UP_RANK)`, WEIGHT_PARTS
    `(programs of columns, S)`; the others as in `gate_backward_with_factors`. Two blocks, since each program writes
    its parts once for both. Of each product, the large operand is the right one: Triton would compute a left one in
    several layouts.
    """
    program = tl.program_id(0).to(tl.int64)
    expert, start, end, is_whole = run_of_expert(ENDS, RUNS, bound, LENGTH)
    if expert >= 0:
        DTYPE: tl.constexpr = OUT.dtype.element_ty
        first_0 = 2 * tl.program_id(0) * WIDTH
        first_1 = first_0 + WIDTH
        column_0, gate_0, up_0 = _features(first_0, COLUMNS, INTERLEAVED, WIDTH)
        column_1, gate_1, up_1 = _features(first_1, COLUMNS, INTERLEAVED, WIDTH)
        is_column_0, is_column_1 = column_0 < COLUMNS, column_1 < COLUMNS
        up_b = UP_B + expert.to(tl.int64) * UP_STRIDES[0]
        gate_b_0 = _load_factor(up_b, gate_0, is_column_0, UP_RANK, UP_RANKS, UP_STRIDES).to(DTYPE)
        gate_b_1 = _load_factor(up_b, gate_1, is_column_1, UP_RANK, UP_RANKS, UP_STRIDES).to(DTYPE)
        up_b_0 = _load_factor(up_b, up_0, is_column_0, UP_RANK, UP_RANKS, UP_STRIDES).to(DTYPE)
        up_b_1 = _load_factor(up_b, up_1, is_column_1, UP_RANK, UP_RANKS, UP_STRIDES).to(DTYPE)
        grad_a_0 = tl.zeros((DOWN_RANKS, WIDTH), tl.float32)
        grad_a_1 = tl.zeros((DOWN_RANKS, WIDTH), tl.float32)
        grad_gate_b_0 = tl.zeros((UP_RANKS, WIDTH), tl.float32)
        grad_gate_b_1 = tl.zeros((UP_RANKS, WIDTH), tl.float32)
        grad_up_b_0 = tl.zeros((UP_RANKS, WIDTH), tl.float32)
        grad_up_b_1 = tl.zeros((UP_RANKS, WIDTH), tl.float32)
        index = tl.arange(0, ROWS)
        up_r = tl.arange(0, UP_RANKS)
        # loaded one and two steps ahead, since an address depends on another load
        is_row = start + index < end
        next_pair = tl.load(PAIR_OF_ROW + start + index, mask=is_row, other=0)
        next_weight = tl.load(WEIGHTS + next_pair, mask=is_row, other=0.0)
        next_pair = tl.load(PAIR_OF_ROW + start + ROWS + index, mask=start + ROWS + index < end, other=0)
        for first in range(start, end, ROWS):
            row = first + index
            is_row = row < end
            weight = next_weight.to(tl.float32)
            next_weight = tl.load(WEIGHTS + next_pair, mask=row + ROWS < end, other=0.0)
            next_pair = tl.load(PAIR_OF_ROW + row + 2 * ROWS, mask=row + 2 * ROWS < end, other=0)
            first = tl.cast(first, tl.int64)
            down_reduced = _load_reduced(DOWN_REDUCED + first * DOWN_RANK, index, is_row, DOWN_RANK, DOWN_RANKS)
            up_reduced = _load_reduced(UP_REDUCED + first * UP_RANK, index, is_row, UP_RANK, UP_RANKS)
            x = X + first * (2 * COLUMNS)
            grad = GRAD + first * COLUMNS
            out = OUT + first * (2 * COLUMNS)

            value, by_gate, by_up, dots = _gradients_of_block(
                x, grad, out, first_0, index, is_row, weight, limit, alpha, COLUMNS, KIND, INTERLEAVED, WIDTH
            )
            grad_a_0 = tl.dot(down_reduced, value, grad_a_0, input_precision="ieee")
            grad_gate_b_0 = tl.dot(up_reduced, by_gate, grad_gate_b_0, input_precision="ieee")
            grad_up_b_0 = tl.dot(up_reduced, by_up, grad_up_b_0, input_precision="ieee")
            reduced = tl.dot(gate_b_0, tl.trans(by_gate), input_precision="ieee")
            reduced = tl.dot(up_b_0, tl.trans(by_up), reduced, input_precision="ieee")

            value, by_gate, by_up, more_dots = _gradients_of_block(
                x, grad, out, first_1, index, is_row, weight, limit, alpha, COLUMNS, KIND, INTERLEAVED, WIDTH
            )
            grad_a_1 = tl.dot(down_reduced, value, grad_a_1, input_precision="ieee")
            grad_gate_b_1 = tl.dot(up_reduced, by_gate, grad_gate_b_1, input_precision="ieee")
            grad_up_b_1 = tl.dot(up_reduced, by_up, grad_up_b_1, input_precision="ieee")
            reduced = tl.dot(gate_b_1, tl.trans(by_gate), reduced, input_precision="ieee")
            reduced = tl.dot(up_b_1, tl.trans(by_up), reduced, input_precision="ieee")

            parts = program * num_rows + first
            tl.store(WEIGHT_PARTS + parts + index, dots + more_dots, mask=is_row)
            place = REDUCED_PARTS + parts * UP_RANK + index[None, :] * UP_RANK + up_r[:, None]
            tl.store(place, reduced, mask=(up_r < UP_RANK)[:, None] & is_row[None, :])

        run = (expert, start, end - start, half, is_whole)
        a: tl.constexpr = (COLUMNS, DOWN_RANK, DOWN_STRIDES, LENGTH)
        b: tl.constexpr = (2 * COLUMNS, UP_RANK, GRAD_UP_STRIDES, LENGTH)
        store_gradient(tl.trans(grad_a_0), GRAD_DOWN_A, DOWN_PARTS, run, column_0, is_column_0, a)
        store_gradient(tl.trans(grad_a_1), GRAD_DOWN_A, DOWN_PARTS, run, column_1, is_column_1, a)
        store_gradient(tl.trans(grad_gate_b_0), GRAD_UP_B, UP_PARTS, run, gate_0, is_column_0, b)
        store_gradient(tl.trans(grad_gate_b_1), GRAD_UP_B, UP_PARTS, run, gate_1, is_column_1, b)
        store_gradient(tl.trans(grad_up_b_0), GRAD_UP_B, UP_PARTS, run, up_0, is_column_0, b)
        store_gradient(tl.trans(grad_up_b_1), GRAD_UP_B, UP_PARTS, run, up_1, is_column_1, b)


@triton.jit(do_not_specialize=["num_rows", "scaling"])
def _sum_of_parts_kernel(
    REDUCED_PARTS,
    WEIGHT_PARTS,
    ROW_TERM,
    PAIR_OF_ROW,
    ENDS,
    REDUCED,
    GRAD_WEIGHTS,
    num_rows,
    scaling,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_ROW_TERM: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: blocks of `ROWS` rows. REDUCED_PARTS `(PARTS, S, RANK)`, WEIGHT_PARTS `(PARTS, S)`, ROW_TERM `(S,)`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    # rows without an expert have no parts
    is_here = row < tl.load(ENDS + NUM_EXPERTS - 1)
    r = tl.arange(0, RANKS)
    is_rank = is_here[:, None] & (r < RANK)[None, :]
    reduced = tl.zeros((ROWS, RANKS), tl.float32)
    grad_weight = tl.zeros((ROWS,), tl.float32)
    for part in range(PARTS):
        place = row + tl.cast(part, tl.int64) * num_rows
        reduced += tl.load(REDUCED_PARTS + place[:, None] * RANK + r[None, :], mask=is_rank, other=0.0)
        grad_weight += tl.load(WEIGHT_PARTS + place, mask=is_here, other=0.0)
    if HAS_ROW_TERM:
        grad_weight += tl.load(ROW_TERM + row, mask=is_here, other=0.0).to(tl.float32)
    place = REDUCED + row[:, None].to(tl.int64) * RANK + r[None, :]
    tl.store(place, (reduced * scaling).to(REDUCED.dtype.element_ty), mask=is_rank)
    pair = tl.load(PAIR_OF_ROW + row, mask=is_row, other=0)
    tl.store(GRAD_WEIGHTS + pair, grad_weight.to(GRAD_WEIGHTS.dtype.element_ty), mask=is_row)


ROWS = 32
WIDTH = 64
MOST_RANKS = 16
"""Limit on the padded ranks, whose sums are kept in registers."""
MOST_BYTES = 256 * 2**20
"""Limit on the memory of all programs' parts of sums; the workspace of decoded weights has the same."""


def fits_one_pass(gate_input: torch.Tensor, down_rank: int, up_rank: int) -> bool:
    """Whether `gate_backward_with_factors` is fast and needs little memory; in fp32, registers spill.

    Args:
        gate_input: `(S, 2I)`.
        down_rank: rank of the second projection's factors.
        up_rank: rank of the first projection's factors.
    """
    num_rows, columns = gate_input.shape[0], gate_input.shape[1] // 2
    nbytes = 4 * num_rows * cdiv(columns, 2 * WIDTH) * (up_rank + 1)
    has_few_ranks = max(padded_rank(down_rank), padded_rank(up_rank)) <= MOST_RANKS
    return gate_input.dtype.itemsize == 2 and has_few_ranks and nbytes <= MOST_BYTES


def gate_backward_with_factors(
    x: torch.Tensor,
    grad: torch.Tensor,
    weights: torch.Tensor,
    gate: Gate,
    rows: RoutedRows,
    row_term: torch.Tensor | None,
    down_reduced: torch.Tensor,
    up_reduced: torch.Tensor,
    up_B: torch.Tensor,
    up_scaling: float,
    grad_down_A: torch.Tensor,
    grad_up_B: torch.Tensor,
    runs: Tiles | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gate_backward`, and `factor_gradient` and `reduce_rows` of its results, in one pass.

    Args:
        x: as in `gate_backward`; so are `grad`, `weights`, `gate`, `rows` and `row_term`.
        down_reduced: `(S, R)`, multiplied by the weighted gated rows for the gradient of A of the second projection.
        up_reduced: `(S, R')`, multiplied by the gradient of x for the gradient of B of the first projection.
        up_B: `(E, 2I, R')` view with any strides, in any floating-point dtype.
        up_scaling: factor of the product of the gradient of x with `up_B`.
        grad_down_A: `(E, I, R)` output view with any strides, in any floating-point dtype.
        grad_up_B: `(E, 2I, R')` output view, likewise.
        runs: as in `factor_gradient`.

    Returns:
        `(S, 2I)` gradient of x, `(T, K)` gradient of the weights, and `(S, R')` scaled product of the gradient of x
        with `up_B`. Rows without an expert are not written; the gradients of their weights are 0.
    """
    num_rows, columns = x.shape[0], x.shape[1] // 2
    num_experts, _, down_rank = grad_down_A.shape
    up_rank = up_B.shape[2]
    programs = cdiv(columns, 2 * WIDTH)
    out = allocate(x.shape, x.dtype, x.device)
    grad_weights = allocate(weights.shape, weights.dtype, weights.device)
    reduced = allocate((num_rows, up_rank), x.dtype, x.device)
    reduced_parts = allocate((programs, num_rows, up_rank), torch.float32, x.device)
    weight_parts = allocate((programs, num_rows), torch.float32, x.device)
    tiles, bound, length, half = parts_of_runs(runs, rows.ends, num_rows)
    down_parts, up_parts = grad_down_A, grad_up_B
    if runs is not None:
        down_parts = allocate((2 * half, columns, down_rank), torch.float32, x.device)
        up_parts = allocate((2 * half, 2 * columns, up_rank), torch.float32, x.device)
    # as measured on an H200
    has_room = x.dtype.itemsize == 2 and not gate.interleaved and has_much_shared_memory(x.device)
    launch(
        _gate_factors_kernel,
        (programs, bound),
        (
            x,
            grad,
            weights,
            rows.pair_of_row,
            down_reduced,
            up_reduced,
            up_B,
            rows.ends,
            tiles,
            out,
            grad_down_A,
            grad_up_B,
            down_parts,
            up_parts,
            reduced_parts,
            weight_parts,
        ),
        (bound, half, num_rows, gate.limit, gate.alpha),
        num_stages=3 if has_room else 2,
        COLUMNS=columns,
        KIND=gate.kind,
        INTERLEAVED=gate.interleaved,
        DOWN_RANK=down_rank,
        DOWN_RANKS=padded_rank(down_rank),
        DOWN_STRIDES=grad_down_A.stride(),
        UP_RANK=up_rank,
        UP_RANKS=padded_rank(up_rank),
        UP_STRIDES=up_B.stride(),
        GRAD_UP_STRIDES=grad_up_B.stride(),
        ROWS=ROWS,
        WIDTH=WIDTH,
        LENGTH=length,
    )
    if runs is not None:
        sum_runs(down_parts, rows.ends, grad_down_A, length)
        sum_runs(up_parts, rows.ends, grad_up_B, length)
    launch(
        _sum_of_parts_kernel,
        (cdiv(num_rows, ROWS),),
        (
            reduced_parts,
            weight_parts,
            weight_parts if row_term is None else row_term,
            rows.pair_of_row,
            rows.ends,
            reduced,
            grad_weights,
        ),
        (num_rows, up_scaling),
        PARTS=programs,
        RANK=up_rank,
        RANKS=padded_rank(up_rank),
        HAS_ROW_TERM=row_term is not None,
        NUM_EXPERTS=num_experts,
        ROWS=ROWS,
    )
    return out, grad_weights, reduced
