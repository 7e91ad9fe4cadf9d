"""The grouped product of `grouped_gemm` for compute capability 9.0, with specialized warps.

A program has twelve warps. Four copy rows, codes and scales to a ring of stages in shared memory. Two groups of four
multiply one half of a tile's 128 columns each, with the weight as the left operand, which they decode in registers:
while one group decodes, the tensor cores work for the other. During its own product, a group waits for the next stage
and loads codes. Programs are persistent, so that the copies for a tile start during the last products of the one
before. The highest tiles come first, so that programs finish at about the same time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..operands import PackedWeight
from .byte_table import store_byte_table
from .codec import codec_of
from .decode import with_plain_scales
from .gemm_operands import LowRankTerm, Rows
from .launch import launch, next_power_of_2
from .launch_recorder import allocate
from .left_operand import GROUP_N, column_of, left_operand, load_codes
from .schedule import Tiles
from .specialized_copy import copy_tiles
from .specialized_shape import (
    COPY_WARPS,
    TILE_N,
    GemmShape,
    allocate_reduced,
    allocate_ring,
    find_tile,
    parts_of,
    stage_before,
    stage_of,
)
from .tile_table import GemmTiles

MOST_SHARED_BYTES = 215 * 1024
"""Limit on `GemmShape.shared_bytes`: of 227 KiB, results take 8, and barriers less than 1."""
LEAST_RING_BYTES = 48 * 1024
"""The ring must be larger with a table of bytes: Triton raises the driver's limit of 48 KiB only for kernels with more
dynamic shared memory, to which variables of PTX do not belong."""
WIDE_COLUMNS = 8192
"""With more columns than this, `ROWS_TOGETHER` tiles of rows go through them together. One by one, an expert's weights
would leave the cache before its next rows need them. With fewer columns, the programs that run at the same time cover
several tiles of rows anyway."""
ROWS_TOGETHER = 4
REGISTERS = 168
"""Registers of a thread at the start; twelve warps share 65,536."""
_STORED_ROWS = tl.constexpr(64)
"""Rows of a tile that are stored at once."""
_LINES = tl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Layout of stored rows: 128 bytes of each."""
WORKER_REGISTERS = tl.constexpr((192, 112))
"""Those of the second group of multiplying warps, and of the copying warps; the first group gets the rest."""


@gluon.constexpr_function
def _sum_layout(height):
    """Accumulator of a group, `(64, height)`."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, height, 16])


@gluon.jit
def _load_codes(ring, count, inner: tl.constexpr, HALF: tl.constexpr, SHAPE: tl.constexpr):
    """Waits for a stage, and loads the codes of one group."""
    codes_ring, full = ring[1], ring[3]
    stage, phase = stage_of(count, inner, SHAPE)
    mbarrier.wait(full.index(stage), phase)
    fence_async_shared()
    codes = codes_ring.index(stage)
    if SHAPE.along_columns:
        codes = codes.slice(HALF * GROUP_N, GROUP_N, 0)
    else:
        WORDS: tl.constexpr = SHAPE.code_words // 2
        codes = codes.slice(HALF * WORDS, WORDS, 1)
    return load_codes(codes, SHAPE.along_columns)


@gluon.jit
def _scales_of(ring, stage, HALF: tl.constexpr, SHAPE: tl.constexpr):
    """Scales of one group in a stage."""
    parts = ring[2].index(stage)
    BLOCKS: tl.constexpr = SHAPE.blocks
    if SHAPE.along_columns:
        parts = parts.slice(HALF * GROUP_N, GROUP_N, 0)
    elif BLOCKS > 1:
        parts = parts.slice(HALF * (BLOCKS // 2), BLOCKS // 2, 1)
    return parts


@gluon.jit
def _zeros(ROWS: tl.constexpr):
    return gl.zeros([GROUP_N, ROWS], tl.float32, _sum_layout(ROWS))


@gluon.jit
def _start_products(left, rights, sums, PARTS: tl.constexpr):
    """Starts to add `left @ right.T` for each part of a tile; `left` has the layout for the first part.

    Args:
        left: left operand, `(64, length)`.
        rights: rows in shared memory, `(at least the rows of the part, length)` each.
        sums: accumulators, `(64, rows of the part)` each.
    """
    acc = warpgroup_mma(left, rights[0].slice(0, PARTS[0], 0).permute([1, 0]), sums[0], is_async=True)
    if len(PARTS) == 1:
        return (acc,)
    else:
        LAYOUT: tl.constexpr = gl.DotOperandLayout(0, _sum_layout(PARTS[1]), 2)
        left = gl.convert_layout(left, LAYOUT, assert_trivial=True)
        extra = warpgroup_mma(left, rights[1].slice(0, PARTS[1], 0).permute([1, 0]), sums[1], is_async=True)
        return (acc, extra)


@gluon.jit
def _wait_for_products(left, sums, PARTS: tl.constexpr):
    """Waits for started products; their operands must not change before."""
    if len(PARTS) == 1:
        acc, _ = warpgroup_mma_wait(0, deps=[sums[0], left])
        return (acc,)
    else:
        acc, extra, _ = warpgroup_mma_wait(0, deps=[sums[0], sums[1], left])
        return (acc, extra)


@gluon.jit
def _at_stage(ring, stage, PARTS: tl.constexpr):
    """Rows of a stage, for each part of a tile."""
    if len(PARTS) == 1:
        return (ring[0].index(stage),)
    else:
        return (ring[0].index(stage), ring[1].index(stage))


@gluon.jit
def _load_factor(FACTOR, expert, first_n, first_r, WIDTH: tl.constexpr, LAYOUT: tl.constexpr, SHAPE: tl.constexpr):
    """Some ranks of a factor as the left operand, `(64, WIDTH)`."""
    STRIDE_E: tl.constexpr = SHAPE.factor_strides[0]
    STRIDE_N: tl.constexpr = SHAPE.factor_strides[1]
    STRIDE_R: tl.constexpr = SHAPE.factor_strides[2]
    n = first_n + column_of(gl.arange(0, GROUP_N, gl.SliceLayout(1, LAYOUT)))
    r = first_r + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    place = FACTOR + expert.to(tl.int64) * STRIDE_E
    place = place + gl.expand_dims(n * STRIDE_N, 1) + gl.expand_dims(r * STRIDE_R, 0)
    return gl.load(place, mask=gl.expand_dims(n < SHAPE.n, 1) & gl.expand_dims(r < SHAPE.rank, 0), other=0.0)


@gluon.jit
def _add_bias(acc, BIAS, expert, first_n, SHAPE: tl.constexpr):
    n = first_n + column_of(gl.arange(0, GROUP_N, gl.SliceLayout(1, acc.type.layout)))
    bias = gl.load(BIAS + expert.to(tl.int64) * SHAPE.n + n, mask=n < SHAPE.n, other=0.0)
    return acc + gl.expand_dims(bias.to(tl.float32), 1)


@gluon.jit
def _store_tile(acc, OUT, first_n, start, end, HEIGHT: tl.constexpr, SHAPE: tl.constexpr):
    """Stores the rows before `end` of `acc`, `(64, HEIGHT)` in fp32.

    Each `_STORED_ROWS` pass through shared memory, from which whole lines are stored.
    """
    if HEIGHT > _STORED_ROWS:
        HALF: tl.constexpr = HEIGHT // 2
        first, second = gl.split(acc.reshape([GROUP_N, 2, HALF]).permute([0, 2, 1]))
        _store_tile(first, OUT, first_n, start, end, HALF, SHAPE)
        _store_tile(second, OUT, first_n, start + HALF, end, HALF, SHAPE)
    else:
        N: tl.constexpr = SHAPE.n
        # from (pair of warps, warp, neighbors, r), see `column_of`
        out = acc.reshape([2, 2, 2, 8, HEIGHT]).permute([4, 0, 3, 1, 2]).reshape([HEIGHT, GROUP_N])
        out = gl.convert_layout(out.to(OUT.dtype.element_ty), _LINES)
        row = start + gl.arange(0, HEIGHT, gl.SliceLayout(1, _LINES))
        n = first_n + gl.arange(0, GROUP_N, gl.SliceLayout(0, _LINES))
        place = OUT + gl.expand_dims(row.to(tl.int64) * N, 1) + gl.expand_dims(n, 0)
        gl.store(place, out, mask=gl.expand_dims(row < end, 1) & gl.expand_dims(n < N, 0))


@gluon.jit
def _multiply_tile(
    FACTOR,
    BIAS,
    OUT,
    expert,
    tile_n,
    start,
    end,
    count,
    low_count,
    ring,
    term,
    HALF: tl.constexpr,
    HEIGHT: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One half of a tile; returns the numbers of iterations and of low-rank products up to now."""
    x_ring, empty = ring[0], ring[4]
    reduced, low_full, low_empty = term
    DTYPE: tl.constexpr = OUT.dtype.element_ty
    PARTS: tl.constexpr = parts_of(HEIGHT)
    LEFT: tl.constexpr = gl.DotOperandLayout(0, _sum_layout(PARTS[0]), 2)
    first_n = tile_n * TILE_N + HALF * GROUP_N
    sums = ()
    for part in gl.static_range(len(PARTS)):
        sums = sums + (_zeros(PARTS[part]),)  # noqa: RUF005 - kernels cannot unpack
    CODEC: tl.constexpr = SHAPE.codec
    COLUMNS: tl.constexpr = SHAPE.along_columns
    WIDTH: tl.constexpr = SHAPE.ranks_at_once
    if SHAPE.loads_factor_early:
        factor = _load_factor(FACTOR, expert, first_n, 0, WIDTH, LEFT, SHAPE)
    STEPS: tl.constexpr = SHAPE.steps
    AT_ONCE: tl.constexpr = SHAPE.steps_at_once
    words = _load_codes(ring, count, 0, HALF, SHAPE)
    for outer in range(STEPS // AT_ONCE):
        for inner in gl.static_range(AT_ONCE):
            stage, _ = stage_of(count, inner, SHAPE)
            weights = left_operand(words, _scales_of(ring, stage, HALF, SHAPE), COLUMNS, CODEC, LEFT, DTYPE)
            sums = _start_products(weights, _at_stage(x_ring, stage, PARTS), sums, PARTS)
            # during the product, everything but decoding is done for the next step
            if inner > 0:
                mbarrier.arrive(empty.index(inner - 1))
            else:
                mbarrier.arrive(empty.index(stage_before(count, SHAPE)), pred=outer > 0)
            if inner + 1 < AT_ONCE:
                words = _load_codes(ring, count, inner + 1, HALF, SHAPE)
            elif outer + 1 < STEPS // AT_ONCE:
                words = _load_codes(ring, count + 1, 0, HALF, SHAPE)
            sums = _wait_for_products(weights, sums, PARTS)
        count += 1
    mbarrier.arrive(empty.index(stage_before(count, SHAPE)))
    if SHAPE.has_low_rank:
        RANKS: tl.constexpr = SHAPE.padded_rank
        for first_r in gl.static_range(0, RANKS, WIDTH):
            if not SHAPE.loads_factor_early:
                factor = _load_factor(FACTOR, expert, first_n, first_r, WIDTH, LEFT, SHAPE)
            mbarrier.wait(low_full, low_count & 1)
            fence_async_shared()
            left = factor.to(DTYPE)
            sums = _start_products(left, reduced, sums, PARTS)
            sums = _wait_for_products(left, sums, PARTS)
            mbarrier.arrive(low_empty)
            low_count += 1
    for part in gl.static_range(len(PARTS)):
        acc = sums[part]
        if SHAPE.has_bias:
            acc = _add_bias(acc, BIAS, expert, first_n, SHAPE)
        _store_tile(acc, OUT, first_n, start + part * PARTS[0], end, PARTS[part], SHAPE)
    return count, low_count


@gluon.jit
def _multiply_tiles(
    FACTOR, BIAS, OUT, TILES, ENDS, bound, first, stop, ring, term, HALF: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """One group of multiplying warps, for one half of the columns of each tile."""
    HEIGHTS: tl.constexpr = SHAPE.heights
    count = 0
    low_count = 0
    following = find_tile(first, stop, TILES, ENDS, bound, SHAPE)
    for index in range(first, stop, gl.num_programs(0)):
        expert, start, end, height, tile_n = following
        following = find_tile(index + gl.num_programs(0), stop, TILES, ENDS, bound, SHAPE)
        for choice in gl.static_range(len(HEIGHTS)):
            if height == choice:
                count, low_count = _multiply_tile(
                    FACTOR, BIAS, OUT, expert, tile_n, start, end, count, low_count, ring, term,
                    HALF, HEIGHTS[choice], SHAPE,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["bound", "num_experts"])
def specialized_gemm_kernel(
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
    num_experts,
    SHAPE: tl.constexpr,
):
    """Grid: persistent programs.

    X `(rows, K)`; PAIR_OF_ROW `(S,)`; W `(E, rows, words)`, pairs of codes as stored, in integers of `word_bytes`;
    SCALES `(E, rows of the grid, columns of the grid)`; REDUCED `(S, R)`; FACTOR `(E, N, R)` with any strides; BIAS
    `(E, N)`; OUT `(S, N)`; TILES, TILE_ENDS and ENDS as in `Tiles`.
    """
    CODEC: tl.constexpr = SHAPE.codec
    if CODEC.has_byte_pairs:
        store_byte_table(CODEC)
    ring = allocate_ring(SHAPE, X.dtype.element_ty)
    term = allocate_reduced(SHAPE, X.dtype.element_ty)
    TILES_N: tl.constexpr = SHAPE.tiles_n
    first = gl.program_id(0)
    stop = gl.load(TILE_ENDS + num_experts - 1) * TILES_N
    gl.warp_specialize(
        [
            (_multiply_tiles, (FACTOR, BIAS, OUT, TILES, ENDS, bound, first, stop, ring, term, 0, SHAPE)),
            (_multiply_tiles, (FACTOR, BIAS, OUT, TILES, ENDS, bound, first, stop, ring, term, 1, SHAPE)),
            (
                copy_tiles,
                (X, PAIR_OF_ROW, W, SCALES, REDUCED, TILES, ENDS, bound, first, stop, ring, term, SHAPE),
            ),
        ],
        [4, COPY_WARPS],
        [WORKER_REGISTERS[0], WORKER_REGISTERS[1]],
    )


def specialized_gemm(
    rows: Rows,
    weight: PackedWeight,
    for_input_gradient: bool,
    ends: torch.Tensor,
    tiles: Tiles,
    tuned: GemmTiles,
    low_rank: LowRankTerm | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `grouped_gemm`, for products that `supports_specialized` and `can_specialize` admit."""
    along_columns = weight.contracts_columns(for_input_gradient)
    out_features, in_features = (weight.rows, weight.columns) if along_columns else (weight.columns, weight.rows)
    dtype, device = rows.tensor.dtype, rows.tensor.device
    out = allocate((rows.num_rows, out_features), dtype, device)
    reduced, factor = (out, out[:, :, None]) if low_rank is None else low_rank
    rank = 0 if low_rank is None else reduced.shape[1]
    codes, scales = with_plain_scales(weight).tensors
    shape = GemmShape(
        n=out_features,
        k=in_features,
        heights=tiles.heights,
        stages=tuned.num_stages,
        along_columns=along_columns,
        codec=codec_of(weight, dtype),
        top_k=0 if rows.pair_of_row is None else rows.top_k,
        rows_together=ROWS_TOGETHER if out_features > WIDE_COLUMNS else 1,
        rank=rank,
        factor_strides=factor.stride(),
        has_bias=bias is not None,
    )
    shape = replace(shape, stages=_stages_that_fit(shape))
    launch(
        specialized_gemm_kernel,
        (min(tiles.bound * shape.tiles_n, _multiprocessors(device)),),
        (
            rows.tensor,
            out if rows.pair_of_row is None else rows.pair_of_row,
            codes.view({2: torch.int16, 4: torch.int32}[shape.word_bytes]),
            scales,
            reduced,
            factor,
            out if bias is None else bias,
            out,
            tiles.tiles,
            tiles.tile_ends,
            ends,
        ),
        (tiles.bound, weight.num_experts),
        maxnreg=REGISTERS,
        SHAPE=shape,
    )
    return out


def _stages_that_fit(shape: GemmShape) -> int:
    """The number of stages, halved until it fits, but at least the number that is needed.

    The latter is rounded up to a power of two, which divides the usual numbers of steps. It is at least two, since a
    stage is released only after the wait for the next one.
    """
    other = shape.shared_bytes - shape.stages * shape.stage_bytes
    stages = shape.stages
    while stages > 1 and other + stages * shape.stage_bytes > MOST_SHARED_BYTES:
        stages //= 2
    least = LEAST_RING_BYTES // shape.stage_bytes + 1 if shape.codec.has_byte_pairs else 2
    return max(stages, next_power_of_2(least))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
