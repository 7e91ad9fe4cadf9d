"""Product of the rows of each expert with its matrix, packed or in 16 bits, plus a low-rank term and a bias."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..operands import PackedWeight
from .codec import DENSE, codec_of
from .decode import PART_GRANULE, decode, decode_part, weight_block, weight_tile, with_plain_scales
from .gemm_operands import LowRankTerm, Rows, padded_rank, row_places
from .launch import cdiv, launch
from .launch_recorder import allocate
from .schedule import Tiles, cut_rows
from .specialized_support import can_specialize
from .tuning import GemmTiles

WORKSPACE_BYTES = 256 * 2**20
"""Limit for the part of a stack decoded to 16 bits at a time: some experts, or some columns of one expert."""


@triton.jit
def _low_rank_operands(
    REDUCED,
    FACTOR,
    expert,
    row,
    n,
    STRIDE_FE: tl.constexpr,
    STRIDE_FN: tl.constexpr,
    STRIDE_FR: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    r = tl.arange(0, RANKS)
    is_r = (r < RANK)[None, :]
    reduced = tl.load(REDUCED + row[:, None].to(tl.int64) * RANK + r[None, :], mask=is_r, other=0.0)
    place = FACTOR + expert.to(tl.int64) * STRIDE_FE + n[:, None] * STRIDE_FN + r[None, :] * STRIDE_FR
    factor = tl.load(place, mask=(n < N)[:, None] & is_r, other=0.0)
    return reduced, factor.to(DTYPE)


@triton.jit
def _wait_for_product(acc, CODEC: tl.constexpr):
    """Returns the accumulator unchanged, as a new value for the compiler, which makes it wait for the product.

    If the left operand is computed in registers, Triton (3.6; also 3.8 and 3.9, which wait for all wgmma but the last)
    leaves wgmma of one step in flight while the next step overwrites the registers that they read. On an H200, single
    tiles were occasionally wrong.
    """
    ASSEMBLY: tl.constexpr = CODEC.assembly
    if ASSEMBLY != "":
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def _tile(
    X,
    PAIR_OF_ROW,
    W,
    SCALES,
    REDUCED,
    FACTOR,
    BIAS,
    OUT,
    expert,
    weight_expert,
    start,
    end,
    tile_n,
    STRIDE_FE: tl.constexpr,
    STRIDE_FN: tl.constexpr,
    STRIDE_FR: tl.constexpr,
    HEIGHT: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
):
    """One tile of a result with `N` columns; `W`, `FACTOR`, `BIAS` and `OUT` point to `WIDTH` of them."""
    row = start + tl.arange(0, HEIGHT)
    is_row = row < end
    # rows past the end read the first row instead, and are not stored
    row = tl.where(is_row, row, start)
    source = row_places(row, PAIR_OF_ROW, TOP_K, GATHER)
    DTYPE: tl.constexpr = X.dtype.element_ty
    MASK_N: tl.constexpr = WIDTH % TILE_N != 0
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    shape: tl.constexpr = (TILE_N, HEIGHT) if WEIGHT_LEFT else (HEIGHT, TILE_N)
    acc = tl.zeros(shape, tl.float32)
    # apply the scale once per sum over a block, or once per weight
    BLOCK: tl.constexpr = CODEC.block_columns
    BLOCK_K: tl.constexpr = min(BLOCK, TILE_K)
    SCALES_SUMS: tl.constexpr = ALONG_COLUMNS and not WEIGHT_LEFT and 2 * HEIGHT <= BLOCK_K
    STEP_K: tl.constexpr = BLOCK_K if SCALES_SUMS else TILE_K
    MASK_K: tl.constexpr = K % STEP_K != 0
    k = tl.arange(0, STEP_K)
    x_place = X + source[:, None].to(tl.int64) * K + k[None, :]
    for step in range((K + STEP_K - 1) // STEP_K):
        first_k = step * STEP_K
        if MASK_K:
            x = tl.load(x_place + first_k, mask=(first_k + k < K)[None, :], other=0.0)
        else:
            x = tl.load(x_place + first_k)
        if SCALES_SUMS:
            w, scale = weight_block(W, SCALES, weight_expert, n, step, WIDTH, K, STEP_K, MASK_N, MASK_K, CODEC, DTYPE)
            acc += tl.dot(x, tl.trans(w), input_precision="ieee") * scale[None, :]
        else:
            if ALONG_COLUMNS:
                w = weight_tile(
                    W, SCALES, weight_expert, tile_n, step, WIDTH, K, TILE_N, TILE_K, MASK_N, MASK_K, CODEC, DTYPE
                )
                w_left = w
            else:
                w = weight_tile(
                    W, SCALES, weight_expert, step, tile_n, K, WIDTH, TILE_K, TILE_N, MASK_K, MASK_N, CODEC, DTYPE
                )
                w_left = tl.trans(w)
            if WEIGHT_LEFT:
                acc = tl.dot(w_left, tl.trans(x), acc, input_precision="ieee")
                if CODEC.is_packed:
                    acc = _wait_for_product(acc, CODEC)
            else:
                acc = tl.dot(x, tl.trans(w_left), acc, input_precision="ieee")
    if RANK > 0:
        reduced, factor = _low_rank_operands(
            REDUCED, FACTOR, expert, row, n, STRIDE_FE, STRIDE_FN, STRIDE_FR, WIDTH, RANK, RANKS, DTYPE
        )
        if WEIGHT_LEFT:
            acc = tl.dot(factor, tl.trans(reduced), acc, input_precision="ieee")
        else:
            acc = tl.dot(reduced, tl.trans(factor), acc, input_precision="ieee")
    out = tl.trans(acc) if WEIGHT_LEFT else acc
    if HAS_BIAS:
        out += tl.load(BIAS + expert.to(tl.int64) * N + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
    place = OUT + (start + tl.arange(0, HEIGHT))[:, None].to(tl.int64) * N + n[None, :]
    is_out = is_row[:, None] & (n < WIDTH)[None, :] if MASK_N else is_row[:, None]
    tl.store(place, out.to(OUT.dtype.element_ty), mask=is_out)


@triton.jit
def _tile_at(
    index,
    first_tile,
    num_tiles,
    X,
    PAIR_OF_ROW,
    W,
    SCALES,
    REDUCED,
    FACTOR,
    BIAS,
    OUT,
    TILES,
    ENDS,
    bound,
    first_expert,
    STRIDE_FE: tl.constexpr,
    STRIDE_FN: tl.constexpr,
    STRIDE_FR: tl.constexpr,
    HEIGHTS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
):
    # number of row tiles per pass over the columns, since the weight may exceed the cache
    GROUP: tl.constexpr = 1 if CODEC.is_packed else 8
    TILES_N: tl.constexpr = (WIDTH + TILE_N - 1) // TILE_N
    group = index // (GROUP * TILES_N)
    group_size = tl.minimum(num_tiles - group * GROUP, GROUP)
    place = index % (GROUP * TILES_N)
    tile = first_tile + group * GROUP + place % group_size
    tile_n = place // group_size
    expert = tl.load(TILES + tile)
    if expert >= 0:
        start = tl.load(TILES + bound + tile)
        height = tl.load(TILES + 2 * bound + tile)
        end = tl.load(ENDS + expert)
        for choice in tl.static_range(len(HEIGHTS)):
            if height == choice:
                _tile(
                    X, PAIR_OF_ROW, W, SCALES, REDUCED, FACTOR, BIAS, OUT,
                    expert, expert - first_expert, start, end, tile_n, STRIDE_FE, STRIDE_FN, STRIDE_FR,
                    HEIGHTS[choice], N, WIDTH, K, TOP_K, GATHER, ALONG_COLUMNS, CODEC,
                    RANK, RANKS, HAS_BIAS, TILE_N, TILE_K, WEIGHT_LEFT,
                )  # fmt: skip


@triton.jit(do_not_specialize=["bound", "first_expert", "last_expert"])
def _grouped_gemm_kernel(
    X,
    PAIR_OF_ROW,
    W,
    SCALES,
    REDUCED,
    FACTOR,
    BIAS,
    OUT,
    TILES,
    TILE_ENDS,
    ENDS,
    bound,
    first_expert,
    last_expert,
    STRIDE_FE: tl.constexpr,
    STRIDE_FN: tl.constexpr,
    STRIDE_FR: tl.constexpr,
    HEIGHTS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    LOOPS: tl.constexpr,
):
    if LOOPS:
        TILES_N: tl.constexpr = (WIDTH + TILE_N - 1) // TILE_N
        first_tile = tl.load(TILE_ENDS + first_expert - 1, mask=first_expert > 0, other=0)
        last_tile = tl.load(TILE_ENDS + last_expert)
        num_tiles = last_tile - first_tile
        for index in range(tl.program_id(0), num_tiles * TILES_N, tl.num_programs(0)):
            _tile_at(index, first_tile, num_tiles,
                X, PAIR_OF_ROW, W, SCALES, REDUCED, FACTOR, BIAS, OUT, TILES, ENDS,
                bound, first_expert, STRIDE_FE, STRIDE_FN, STRIDE_FR,
                HEIGHTS, N, WIDTH, K, TOP_K, GATHER, ALONG_COLUMNS, CODEC,
                RANK, RANKS, HAS_BIAS, TILE_N, TILE_K, WEIGHT_LEFT,
            )  # fmt: skip
    else:
        _tile_at(tl.program_id(0), 0, bound,
            X, PAIR_OF_ROW, W, SCALES, REDUCED, FACTOR, BIAS, OUT, TILES, ENDS,
            bound, first_expert, STRIDE_FE, STRIDE_FN, STRIDE_FR,
            HEIGHTS, N, WIDTH, K, TOP_K, GATHER, ALONG_COLUMNS, CODEC,
            RANK, RANKS, HAS_BIAS, TILE_N, TILE_K, WEIGHT_LEFT,
        )  # fmt: skip


def grouped_gemm(
    rows: Rows,
    weight: PackedWeight,
    for_input_gradient: bool,
    ends: torch.Tensor,
    tiles: Tiles,
    tuned: GemmTiles,
    low_rank: LowRankTerm | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(S, N)` in the dtype of the rows; rows without an expert are not written.

    Args:
        rows: `(S, K)`, or tokens to gather them from.
        weight: `(out, in)` matrices, independent of the orientation of storage: `N, K = out, in`.
        for_input_gradient: multiply by the matrices instead of their transposes: `N, K = in, out`.
        ends: `(E,)` int32, exclusive end of each expert's rows.
        tiles: tiles of the rows.
        tuned: shape of the tiles, and whether the weight is decoded inside the product or before.
        low_rank: low-rank term to add.
        bias: `(E, N)`, bias to add.
    """
    if tuned.specialized and can_specialize(rows, weight, low_rank):
        # not above: Gluon's interface differs between versions of Triton, and unknown ones do not come here
        from .specialized_gemm import specialized_gemm

        return specialized_gemm(rows, weight, for_input_gradient, ends, tiles, tuned, low_rank, bias)
    if tuned.specialized:
        tuned = tuned.for_the_other_kernel
        if tiles.cut != tuned.cut:
            tiles = cut_rows(ends, rows.num_rows, tuned.cut)
    along_columns = weight.contracts_columns(for_input_gradient)
    out_features, in_features = (weight.rows, weight.columns) if along_columns else (weight.columns, weight.rows)
    dtype, device = rows.tensor.dtype, rows.tensor.device
    out = allocate((rows.num_rows, out_features), dtype, device)
    # a tile can locate its scales only if rows consist of whole blocks
    decodes_before = weight.is_packed and (tuned.decode_first or weight.tile_block is None)
    codec = DENSE if decodes_before else codec_of(weight, dtype)
    term, factor = (out, out[:, :, None]) if low_rank is None else low_rank
    rank = 0 if low_rank is None else term.shape[1]
    strides = factor.stride()

    def multiply(
        tensors: tuple[torch.Tensor, ...], first_expert: int, num_experts: int, loops: bool, columns: Columns
    ) -> None:
        num_programs = tiles.bound * cdiv(columns.count, tuned.tile_n)
        if loops:
            num_programs = min(num_programs, _resident_programs(device, tuned.num_warps))
        launch(
            _grouped_gemm_kernel,
            (num_programs,),
            (
                rows.tensor,
                out if rows.pair_of_row is None else rows.pair_of_row,
                tensors[0],
                tensors[-1],
                term,
                factor[:, columns.first :],
                out if bias is None else bias[:, columns.first :],
                out[:, columns.first :],
                tiles.tiles,
                tiles.tile_ends,
                ends,
            ),
            (tiles.bound, first_expert, first_expert + num_experts - 1),
            num_warps=tuned.num_warps,
            num_stages=tuned.num_stages,
            STRIDE_FE=strides[0],
            STRIDE_FN=strides[1],
            STRIDE_FR=strides[2],
            HEIGHTS=tiles.heights,
            N=out_features,
            WIDTH=columns.count,
            K=in_features,
            TOP_K=rows.top_k,
            GATHER=rows.pair_of_row is not None,
            ALONG_COLUMNS=along_columns,
            CODEC=codec,
            RANK=rank,
            RANKS=padded_rank(rank),
            HAS_BIAS=bias is not None,
            TILE_N=tuned.tile_n,
            TILE_K=tuned.tile_k,
            WEIGHT_LEFT=tuned.weight_left,
            LOOPS=loops,
        )

    everything = Columns(0, out_features)
    if not decodes_before:
        multiply(with_plain_scales(weight).tensors, 0, weight.num_experts, False, everything)
        return out
    of_expert = weight.rows * weight.columns * dtype.itemsize
    if of_expert > WORKSPACE_BYTES:
        width = columns_at_a_time(out_features, in_features, dtype, weight)
        workspace = allocate((width * in_features,), dtype, device)
        for expert in range(weight.num_experts):
            for first in range(0, out_features, width):
                columns = Columns(first, min(width, out_features - first))
                decode_part(weight, expert, along_columns, *columns, out=workspace)
                multiply((workspace,), expert, 1, True, columns)
        return out
    group = cdiv(weight.num_experts, cdiv(weight.num_experts * of_expert, WORKSPACE_BYTES))
    group = min(group, WORKSPACE_BYTES // of_expert)
    workspace = allocate((group, weight.rows, weight.columns), dtype, device)
    for first in range(0, weight.num_experts, group):
        count = min(group, weight.num_experts - first)
        decode(weight, first, count, dtype, out=workspace)
        # the number of tiles in a group is known only on the device, so use persistent programs
        multiply((workspace,), first, count, group < weight.num_experts, everything)
    return out


class Columns(NamedTuple):
    """A range of columns of a result."""

    first: int
    count: int


def columns_at_a_time(out_features: int, in_features: int, dtype: torch.dtype, weight: PackedWeight) -> int:
    """Number of columns of a result to compute at a time if the matrix of an expert exceeds the workspace.

    Args:
        out_features: columns of the result.
        in_features: columns of the rows.
        dtype: dtype of the workspace.
        weight: the weight; each range of columns starts at a block.
    """
    granule = max(PART_GRANULE, weight.storage.flat_blocksize or 0)
    fitting = WORKSPACE_BYTES // (in_features * dtype.itemsize) // granule * granule
    return min(out_features, max(granule, fitting))


@cache
def _resident_programs(device: torch.device, num_warps: int) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 8 // num_warps)
