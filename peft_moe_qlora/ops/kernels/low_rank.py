"""Low-rank products: rows times A, and the gradients of the factors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gemm_operands import Rows, padded_rank, row_places
from .launch import cdiv, has_much_shared_memory, launch, next_power_of_2
from .launch_recorder import allocate
from .schedule import Tiles, part_of_tile


@triton.jit(do_not_specialize=["bound", "scaling"])
def _reduce_kernel(
    X,
    PAIR_OF_ROW,
    FACTOR,
    OUT,
    TILES,
    ENDS,
    bound,
    scaling,
    STRIDE_FE: tl.constexpr,
    STRIDE_FK: tl.constexpr,
    STRIDE_FR: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HEIGHT: tl.constexpr,
    PART: tl.constexpr,
    TILE_K: tl.constexpr,
):
    expert, start, row, is_row, is_there = part_of_tile(TILES, ENDS, bound, PART, HEIGHT)
    if is_there:
        DTYPE: tl.constexpr = X.dtype.element_ty
        source = row_places(tl.where(is_row, row, start), PAIR_OF_ROW, TOP_K, GATHER)
        r = tl.arange(0, RANKS)
        k = tl.arange(0, TILE_K)
        x_place = X + source[:, None].to(tl.int64) * K + k[None, :]
        f_place = FACTOR + expert.to(tl.int64) * STRIDE_FE + r[None, :] * STRIDE_FR + k[:, None] * STRIDE_FK
        acc = tl.zeros((PART, RANKS), tl.float32)
        for first in range(0, K, TILE_K):
            is_k = first + k < K
            x = tl.load(x_place + first, mask=is_k[None, :], other=0.0)
            factor = tl.load(f_place + first * STRIDE_FK, mask=is_k[:, None] & (r < RANK)[None, :], other=0.0)
            acc = tl.dot(x, factor.to(DTYPE), acc, input_precision="ieee")
        place = OUT + row[:, None].to(tl.int64) * RANK + r[None, :]
        tl.store(place, (acc * scaling).to(DTYPE), mask=is_row[:, None] & (r < RANK)[None, :])


def reduce_rows(rows: Rows, factor: torch.Tensor, scaling: float, ends: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """`scaling * rows[s] @ factor[expert of s]`: `(S, R)` in the dtype of the rows.

    Args:
        rows: `(S, K)`, or tokens to gather them from.
        factor: `(E, K, R)` view with any strides, in any floating-point dtype; rounded to the dtype of the rows.
        scaling: factor of the product.
        ends: `(E,)` int32.
        tiles: tiles of the rows.
    """
    _, in_features, rank = factor.shape
    out = allocate((rows.num_rows, rank), rows.tensor.dtype, rows.tensor.device)
    height = tiles.heights[0]
    # rows and features per step, and loads in flight, as measured on an H200
    if height <= 16:
        part, num_stages = height, 3
        tile_k = 256 if rank <= 16 or has_much_shared_memory(out.device) else 128
    elif height == 128:
        part, tile_k, num_stages = height, 64, 3
    elif rows.tensor.dtype.itemsize == 2 and rank <= 32 and has_much_shared_memory(out.device):
        part, tile_k, num_stages = min(height, 64), 256, 4
    else:
        part, tile_k, num_stages = min(height, 64), 128, 2
    strides = factor.stride()
    launch(
        _reduce_kernel,
        (tiles.bound * cdiv(height, part),),
        (rows.tensor, out if rows.pair_of_row is None else rows.pair_of_row, factor, out, tiles.tiles, ends),
        (tiles.bound, scaling),
        num_stages=num_stages,
        STRIDE_FE=strides[0],
        STRIDE_FK=strides[1],
        STRIDE_FR=strides[2],
        K=in_features,
        TOP_K=rows.top_k,
        GATHER=rows.pair_of_row is not None,
        RANK=rank,
        RANKS=padded_rank(rank),
        HEIGHT=height,
        PART=part,
        TILE_K=tile_k if rank <= 32 else 32,
    )
    return out


ROWS_OF_A_STEP = 32
COLUMNS_OF_A_PROGRAM = 128
SERIAL_ROWS = 512
"""Number of rows of an expert above which they are summed in several runs, with another launch for the total."""
ENOUGH_PROGRAMS = 1024
"""Number of programs that occupies all multiprocessors of a large GPU."""


PARTS_BYTES = 32 * 2**20
"""Limit on the memory for sums of runs of rows."""


def rows_of_a_run(num_rows: int, num_experts: int, columns: int, rank: int) -> int | None:
    """Largest number of rows of an expert that one program sums in a factor gradient; None for all rows.

    Chosen from the mean, since row counts are known only on the device. Rows are split if there are many, since
    routing may concentrate them on a few experts, and if there are too few experts to occupy the GPU.

    Args:
        num_rows: number of rows, S.
        num_experts: number of experts, E.
        columns: features of the rows.
        rank: rank of the factors.
    """
    mean = cdiv(num_rows, num_experts)
    programs = num_experts * cdiv(columns, COLUMNS_OF_A_PROGRAM)
    # enough programs for even routing
    length = max(next_power_of_2(mean * programs // ENOUGH_PROGRAMS), 4 * ROWS_OF_A_STEP)
    if mean < 2 * length:
        # with few rows in total, no expert has many
        if num_rows < 16 * SERIAL_ROWS:
            return None
        # twice the mean: with even routing, no expert is split
        length = max(next_power_of_2(2 * mean), SERIAL_ROWS)
    while _num_parts(num_rows, length) * columns * rank * 4 > PARTS_BYTES and length < num_rows:
        length *= 2
    return length if length < num_rows else None


def _num_parts(num_rows: int, length: int) -> int:
    return 2 * (num_rows // length + 1)


@triton.jit
def _place_of_part(start, rows, half, LENGTH: tl.constexpr):
    """Slot for the sum of a run of an expert with several runs; there are `2 * half` slots.

    Full runs start at least `LENGTH` apart. A shorter run follows a full one and uses the same slot in the other half.
    """
    return tl.where(rows == LENGTH, start // LENGTH, half + start // LENGTH - 1)


@triton.jit(do_not_specialize=["bound", "half"])
def _factor_gradient_kernel(
    X,
    PAIR_OF_ROW,
    REDUCED,
    WEIGHTS,
    OUT,
    ENDS,
    RUNS,
    PARTS,
    bound,
    half,
    STRIDE_OE: tl.constexpr,
    STRIDE_OC: tl.constexpr,
    STRIDE_OR: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Grid: blocks of columns; experts, or runs of up to `LENGTH` rows of one expert.

    The gradient of an expert with one run is written to `OUT`, others to `PARTS (2 * half, COLUMNS, RANK)`.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if LENGTH == 0:
        expert = tl.program_id(1)
        start = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ENDS + expert)
        is_whole = True
    else:
        expert = tl.load(RUNS + tl.program_id(1))
        start = tl.load(RUNS + bound + tl.program_id(1))
        first_of_expert = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ENDS + expert, mask=expert >= 0, other=0)
        is_whole = end - first_of_expert <= LENGTH
        end = tl.minimum(end, start + LENGTH)
    if expert >= 0:
        r = tl.arange(0, RANKS)
        acc = tl.zeros((BLOCK_COLUMNS, RANKS), tl.float32)
        for first in range(start, end, BLOCK_ROWS):
            row = first + tl.arange(0, BLOCK_ROWS)
            is_row = row < end
            source = row_places(tl.where(is_row, row, start), PAIR_OF_ROW, TOP_K, GATHER).to(tl.int64)
            x = tl.load(X + source[:, None] * COLUMNS + column[None, :], mask=(column < COLUMNS)[None, :], other=0.0)
            reduced = tl.load(
                REDUCED + row[:, None].to(tl.int64) * RANK + r[None, :],
                mask=is_row[:, None] & (r < RANK)[None, :],
                other=0.0,
            )
            if HAS_WEIGHTS:
                pair = tl.load(PAIR_OF_ROW + row, mask=is_row, other=0)
                weight = tl.load(WEIGHTS + pair, mask=is_row, other=0.0).to(tl.float32)
                reduced = (reduced.to(tl.float32) * weight[:, None]).to(X.dtype.element_ty)
            acc = tl.dot(tl.trans(x), reduced, acc, input_precision="ieee")
        is_out = (column < COLUMNS)[:, None] & (r < RANK)[None, :]
        if is_whole:
            place = OUT + expert.to(tl.int64) * STRIDE_OE + column[:, None] * STRIDE_OC + r[None, :] * STRIDE_OR
            tl.store(place, acc.to(OUT.dtype.element_ty), mask=is_out)
        else:
            # pointers of two dtypes need separate names in the two branches
            part = _place_of_part(start, end - start, half, LENGTH)
            place_of_part = PARTS + part.to(tl.int64) * (COLUMNS * RANK) + column[:, None] * RANK + r[None, :]
            tl.store(place_of_part, acc, mask=is_out)


@triton.jit(do_not_specialize=["half"])
def _sum_of_runs_kernel(
    PARTS,
    ENDS,
    OUT,
    half,
    STRIDE_OE: tl.constexpr,
    STRIDE_OC: tl.constexpr,
    STRIDE_OR: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Sums the runs of each expert in order; skips experts with one run, writes zeros for experts without rows."""
    expert = tl.program_id(1)
    start = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ENDS + expert)
    if (end == start) | (end - start > LENGTH):
        column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        r = tl.arange(0, RANKS)
        is_out = (column < COLUMNS)[:, None] & (r < RANK)[None, :]
        acc = tl.zeros((BLOCK_COLUMNS, RANKS), tl.float32)
        for first in range(start, end, LENGTH):
            part = _place_of_part(first, tl.minimum(end - first, LENGTH), half, LENGTH)
            place_of_part = PARTS + part.to(tl.int64) * (COLUMNS * RANK) + column[:, None] * RANK + r[None, :]
            acc += tl.load(place_of_part, mask=is_out, other=0.0)
        place = OUT + expert.to(tl.int64) * STRIDE_OE + column[:, None] * STRIDE_OC + r[None, :] * STRIDE_OR
        tl.store(place, acc.to(OUT.dtype.element_ty), mask=is_out)


def factor_gradient(
    rows: Rows,
    reduced: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    weights: torch.Tensor | None = None,
    pair_of_row: torch.Tensor | None = None,
    runs: Tiles | None = None,
) -> None:
    """`out[e] = sum over the rows s of e of outer(rows[s], weight[s] * reduced[s])`.

    Args:
        rows: `(S, C)`, or tokens to gather them from.
        reduced: `(S, R)` in the dtype of the rows.
        ends: `(E,)` int32.
        out: `(E, C, R)` output view with any strides, in any floating-point dtype; zeros for experts without rows.
        weights: `(T, K)` routing weights, contiguous; None for ones.
        pair_of_row: `(S,)` int32; required with `weights`.
        runs: tiles of one height (`rows_of_a_run`), which are summed separately and then added in fp32 in a fixed
            order; None to sum each expert in one pass.
    """
    num_experts, columns, rank = out.shape
    pairs = rows.pair_of_row if rows.pair_of_row is not None else pair_of_row
    strides = out.stride()
    blocks = cdiv(columns, COLUMNS_OF_A_PROGRAM)
    if runs is None:
        parts, tiles, bound, length, half = out, ends, num_experts, 0, 0
    else:
        tiles, bound, (length,) = runs.tiles, runs.bound, runs.heights
        half = _num_parts(rows.num_rows, length) // 2
        parts = allocate((2 * half, columns, rank), torch.float32, out.device)
    places = {"STRIDE_OE": strides[0], "STRIDE_OC": strides[1], "STRIDE_OR": strides[2], "COLUMNS": columns}
    ranks = {"RANK": rank, "RANKS": padded_rank(rank)}
    launch(
        _factor_gradient_kernel,
        (blocks, bound),
        (
            rows.tensor,
            reduced if pairs is None else pairs,
            reduced,
            reduced if weights is None else weights,
            out,
            ends,
            tiles,
            parts,
        ),
        (bound, half),
        num_stages=2,
        **places,
        TOP_K=rows.top_k,
        GATHER=rows.pair_of_row is not None,
        HAS_WEIGHTS=weights is not None,
        **ranks,
        BLOCK_ROWS=ROWS_OF_A_STEP,
        BLOCK_COLUMNS=COLUMNS_OF_A_PROGRAM,
        LENGTH=length,
    )
    if runs is not None:
        launch(
            _sum_of_runs_kernel,
            (blocks, num_experts),
            (parts, ends, out),
            (half,),
            **places,
            **ranks,
            BLOCK_COLUMNS=COLUMNS_OF_A_PROGRAM,
            LENGTH=length,
        )
