"""The copying warps of `specialized_gemm`."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from .decode import as_scale, grid_size, scale_row
from .gemm_operands import row_places
from .left_operand import STEP_K, column_of, scale_parts
from .specialized_shape import COPY_WARPS, TILE_N, find_tile, parts_of, stage_of

# since Triton 3.8 it has another name
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def _threads_of(columns, bytes_of_element):
    """Layout of the copying threads for `(rows, columns)`, with 16 bytes each."""
    size = min(16 // bytes_of_element, columns)
    across = min(columns // size, 32)
    return gl.BlockedLayout([1, size], [32 // across, across], [COPY_WARPS.value, 1], [1, 0])


@gluon.jit
def _load_scales(SCALES, expert, tile_n, step, SHAPE: tl.constexpr):
    """`(code_rows, blocks)`: the scales of a stage, as stored."""
    ROWS: tl.constexpr = SHAPE.rows
    COLUMNS: tl.constexpr = SHAPE.columns
    BLOCKS: tl.constexpr = SHAPE.blocks
    BLOCK: tl.constexpr = SHAPE.codec.block_columns
    CODEC: tl.constexpr = SHAPE.codec
    # two neighboring rows in a thread if `scale_parts` combines them
    NEIGHBORS: tl.constexpr = 1 if SHAPE.along_columns else 2
    LAYOUT: tl.constexpr = gl.BlockedLayout([NEIGHBORS, 1], [32 // BLOCKS, BLOCKS], [COPY_WARPS, 1], [1, 0])
    index = gl.arange(0, SHAPE.code_rows, gl.SliceLayout(1, LAYOUT))
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, LAYOUT))
    if SHAPE.along_columns:
        row = tile_n * TILE_N + column_of(index)
        block += step * STEP_K // BLOCK
    else:
        row = step * STEP_K + index
        block += tile_n * TILE_N // BLOCK
    GRID_COLUMNS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    place = SCALES + expert.to(tl.int64) * grid_size(ROWS, COLUMNS, CODEC)
    place = place + gl.expand_dims(scale_row(row, CODEC) * GRID_COLUMNS, 1) + gl.expand_dims(block, 0)
    mask = gl.expand_dims(row < ROWS, 1) & gl.expand_dims(block < GRID_COLUMNS, 0)
    return gl.load(place, mask=mask, other=0)


@gluon.jit
def _rows_of_part(start, first, end, ROWS: tl.constexpr, LAYOUT: tl.constexpr):
    """Rows of one part of a tile. Past the end they are the first row of the tile, and are not stored."""
    row = start + first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    return gl.where(row < end, row, start)


@gluon.jit
def _copy_reduced(REDUCED, start, end, count, term, HEIGHT: tl.constexpr, SHAPE: tl.constexpr):
    """Copies the rows of the low-rank term, `ranks_at_once` at a time; returns the number of copies up to now."""
    reduced, full, empty = term
    WIDTH: tl.constexpr = SHAPE.ranks_at_once
    RANK: tl.constexpr = SHAPE.rank
    LAYOUT: tl.constexpr = _threads_of(WIDTH, 2)
    RANKS: tl.constexpr = SHAPE.padded_rank
    PARTS: tl.constexpr = parts_of(HEIGHT)
    for first in gl.static_range(0, RANKS, WIDTH):
        r = first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
        mbarrier.wait(empty, (count & 1) ^ 1)
        for part in gl.static_range(len(PARTS)):
            row = _rows_of_part(start, part * PARTS[0], end, PARTS[part], LAYOUT)
            place = REDUCED + gl.expand_dims(row.to(tl.int64) * RANK, 1) + gl.expand_dims(r, 0)
            copy_async(reduced[part].slice(0, PARTS[part], 0), place, gl.expand_dims(r < RANK, 0))
        async_copy.mbarrier_arrive(full, increment_count=False)
        count += 1
    return count


@gluon.jit
def _copy_steps(
    X,
    PAIR_OF_ROW,
    W,
    SCALES,
    expert,
    tile_n,
    start,
    end,
    count,
    ring,
    HEIGHT: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Copies rows, codes and scales of all steps of a tile; returns the number of iterations up to now."""
    x_ring, codes_ring, parts_ring, full, empty = ring
    DTYPE: tl.constexpr = X.dtype.element_ty
    CODEC: tl.constexpr = SHAPE.codec
    K: tl.constexpr = SHAPE.k
    LINES: tl.constexpr = _threads_of(STEP_K, 2)
    k = gl.arange(0, STEP_K, gl.SliceLayout(0, LINES))
    PARTS: tl.constexpr = parts_of(HEIGHT)
    x_places = ()
    for part in gl.static_range(len(PARTS)):
        row = _rows_of_part(start, part * PARTS[0], end, PARTS[part], LINES)
        source = row_places(row, PAIR_OF_ROW, SHAPE.top_k, SHAPE.top_k > 0)
        x_place = X + gl.expand_dims(source.to(tl.int64) * K, 1) + gl.expand_dims(k, 0)
        x_places = x_places + (x_place,)  # noqa: RUF005 - kernels cannot unpack

    HIGH: tl.constexpr = SHAPE.code_rows
    WIDE: tl.constexpr = SHAPE.code_words
    WORDS: tl.constexpr = SHAPE.words
    ROWS: tl.constexpr = SHAPE.rows
    CODES: tl.constexpr = _threads_of(WIDE, SHAPE.word_bytes)
    line = gl.arange(0, HIGH, gl.SliceLayout(1, CODES))
    word = gl.arange(0, WIDE, gl.SliceLayout(0, CODES))
    if SHAPE.along_columns:
        line = tile_n * HIGH + column_of(line)
    else:
        word += tile_n * WIDE
    w_place = W + expert.to(tl.int64) * (ROWS * WORDS)
    w_place = w_place + gl.expand_dims(line * WORDS, 1) + gl.expand_dims(word, 0)
    LINE_STEP: tl.constexpr = 0 if SHAPE.along_columns else STEP_K
    WORD_STEP: tl.constexpr = WIDE if SHAPE.along_columns else 0
    W_STEP: tl.constexpr = LINE_STEP * WORDS + WORD_STEP

    KIND: tl.constexpr = CODEC.scale
    UNIT: tl.constexpr = CODEC.unit
    STEPS: tl.constexpr = SHAPE.steps
    AT_ONCE: tl.constexpr = SHAPE.steps_at_once
    # loaded a whole iteration ahead, since they may come from device memory
    scales = ()
    for inner in gl.static_range(AT_ONCE):
        scales = scales + (_load_scales(SCALES, expert, tile_n, inner, SHAPE),)  # noqa: RUF005 - as above
    for outer in range(STEPS // AT_ONCE):
        w_now = w_place + outer * (AT_ONCE * W_STEP)
        for inner in gl.static_range(AT_ONCE):
            step = outer * AT_ONCE + inner
            stage, phase = stage_of(count, inner, SHAPE)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            for part in gl.static_range(len(PARTS)):
                x_target = x_ring[part].index(stage).slice(0, PARTS[part], 0)
                x_now = x_places[part] + outer * (AT_ONCE * STEP_K) + inner * STEP_K
                if SHAPE.is_ragged_k:
                    copy_async(x_target, x_now, gl.expand_dims(step * STEP_K + k < K, 0))
                else:
                    copy_async(x_target, x_now)
            if SHAPE.is_ragged_k or SHAPE.is_ragged_n:
                is_line = line + step * LINE_STEP < ROWS
                is_word = word + step * WORD_STEP < WORDS
                is_code = gl.expand_dims(is_line, 1) & gl.expand_dims(is_word, 0)
                copy_async(codes_ring.index(stage), w_now + inner * W_STEP, is_code)
            else:
                copy_async(codes_ring.index(stage), w_now + inner * W_STEP)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            parts_ring.index(stage).store(
                scale_parts(as_scale(scales[0], KIND) * (1 / UNIT), SHAPE.along_columns, CODEC, DTYPE)
            )
            mbarrier.arrive(full.index(stage))
            # past the last step, those of this one again
            following = _load_scales(SCALES, expert, tile_n, gl.minimum(step + AT_ONCE, STEPS - 1), SHAPE)
            scales = scales[1:] + (following,)  # noqa: RUF005 - as above
        count += 1
    return count


@gluon.jit
def copy_tiles(
    X, PAIR_OF_ROW, W, SCALES, REDUCED, TILES, ENDS, bound, first, stop, ring, term, SHAPE: tl.constexpr
):  # fmt: skip
    """Copies what the tiles of a program need, in the order in which it is multiplied."""
    HEIGHTS: tl.constexpr = SHAPE.heights
    count = 0
    low_count = 0
    following = find_tile(first, stop, TILES, ENDS, bound, SHAPE)
    for index in range(first, stop, gl.num_programs(0)):
        expert, start, end, height, tile_n = following
        following = find_tile(index + gl.num_programs(0), stop, TILES, ENDS, bound, SHAPE)
        for choice in gl.static_range(len(HEIGHTS)):
            if height == choice:
                count = _copy_steps(
                    X, PAIR_OF_ROW, W, SCALES, expert, tile_n, start, end, count, ring, HEIGHTS[choice], SHAPE
                )  # fmt: skip
                if SHAPE.has_low_rank:
                    low_count = _copy_reduced(REDUCED, start, end, low_count, term, HEIGHTS[choice], SHAPE)
