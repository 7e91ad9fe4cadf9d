"""Low-rank products: rows times A, and the gradients of the factors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gemm_operands import Rows, padded_rank, row_places
from .launch import cdiv, has_much_shared_memory, launch
from .launch_recorder import allocate
from .runs import COLUMNS_OF_A_PROGRAM, ROWS_OF_A_STEP, parts_of_runs, run_of_expert, store_gradient, sum_runs
from .schedule import Tiles, part_of_tile
from .tile_table import tile_step


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
    STEP: tl.constexpr,
    PART: tl.constexpr,
    TILE_K: tl.constexpr,
):
    expert, start, row, is_row, is_there = part_of_tile(TILES, ENDS, bound, PART, HEIGHT, STEP)
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
    height, step = tiles.heights[0], tile_step(tiles.heights)
    # rows and features per step, and loads in flight, as measured on an H200
    if step <= 16:
        part, num_stages = step, 3
        tile_k = 256 if rank <= 16 or has_much_shared_memory(out.device) else 128
    elif step == 128:
        part, tile_k, num_stages = step, 64, 3
    elif rows.tensor.dtype.itemsize == 2 and rank <= 32 and has_much_shared_memory(out.device):
        part, tile_k, num_stages = min(step, 64), 256, 4
    else:
        part, tile_k, num_stages = min(step, 64), 128, 2
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
        STEP=step,
        PART=part,
        TILE_K=tile_k if rank <= 32 else 32,
    )
    return out


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

    X `(S, COLUMNS)`, or tokens; REDUCED `(S, RANK)`; OUT `(E, COLUMNS, RANK)`; PARTS as in `store_gradient`.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    expert, start, end, is_whole = run_of_expert(ENDS, RUNS, bound, LENGTH)
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
        run = (expert, start, end - start, half, is_whole)
        shape: tl.constexpr = (COLUMNS, RANK, (STRIDE_OE, STRIDE_OC, STRIDE_OR), LENGTH)
        store_gradient(acc, OUT, PARTS, run, column, column < COLUMNS, shape)


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
    _, columns, rank = out.shape
    pairs = rows.pair_of_row if rows.pair_of_row is not None else pair_of_row
    strides = out.stride()
    blocks = cdiv(columns, COLUMNS_OF_A_PROGRAM)
    tiles, bound, length, half = parts_of_runs(runs, ends, rows.num_rows)
    parts = out if runs is None else allocate((2 * half, columns, rank), torch.float32, out.device)
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
        sum_runs(parts, ends, out, length)
