"""Decodes a tile of a matrix inside another kernel, or consecutive experts into a 16-bit workspace."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...quantization import dynamic_map
from ...quantization.formats.four_bit import NESTED_BLOCKSIZE
from ..operands import PackedWeight
from . import code_tables, e4m3, int8  # noqa: F401 - register their decoders
from .codec import Codec, codec_of
from .e4m3 import e4m3_value
from .launch import cdiv, launch, next_power_of_2
from .launch_recorder import allocate

_NESTED_BLOCKSIZE = tl.constexpr(NESTED_BLOCKSIZE)
_ONE = tl.constexpr(0x3F800000)
"""Bits of 1.0 in fp32."""


@triton.jit
def as_scale(bits, KIND: tl.constexpr):
    """fp32 scales from their bits as integers; fp32 is returned unchanged."""
    if KIND == "fp32":
        return bits.to(tl.float32, bitcast=True)
    elif KIND == "bf16":
        return bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
    elif KIND == "fp16":
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # e8m0: the exponent bits of fp32, where 0 encodes a subnormal number
        exponent = bits.to(tl.int32)
        return tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_row(row, CODEC: tl.constexpr):
    """Rows of the scale grid for rows of a matrix."""
    # Triton compares an attribute at compile time only through a constexpr variable
    BLOCK: tl.constexpr = CODEC.block_rows
    PART: tl.constexpr = CODEC.part_rows
    if BLOCK == 1:
        return row
    elif PART % BLOCK == 0:
        return row // BLOCK
    else:
        part = row // PART
        return part * ((PART + BLOCK - 1) // BLOCK) + (row - part * PART) // BLOCK


@triton.jit
def weight_tile(
    W,
    SCALES,
    expert,
    row_tile,
    column_tile,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`(TILE_ROWS, TILE_COLUMNS)` of an expert's matrix as stored, decoded.

    Args:
        W: `(E, ROWS, COLUMNS / 2)` pairs of codes, or `(E, ROWS, COLUMNS)` in 16 bits.
        SCALES: `(E, rows of the grid, columns of the grid)`.
    """
    row = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_row = (row < ROWS)[:, None]
    if not CODEC.is_packed:
        column = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        place = W + expert.to(tl.int64) * (ROWS * COLUMNS) + row[:, None] * COLUMNS + column[None, :]
        if MASK_ROWS or MASK_COLUMNS:
            tile = tl.load(place, mask=is_row & (column < COLUMNS)[None, :], other=0.0)
        else:
            tile = tl.load(place)
        return tile.to(DTYPE)
    else:
        BLOCK: tl.constexpr = CODEC.block_columns
        PAIRS: tl.constexpr = COLUMNS // 2
        # multiplications only: after a division the compiler cannot prove that addresses are aligned
        pair = column_tile * (TILE_COLUMNS // 2) + tl.arange(0, TILE_COLUMNS // 2)
        place = W + expert.to(tl.int64) * (ROWS * PAIRS) + row[:, None] * PAIRS + pair[None, :]
        if TILE_COLUMNS >= BLOCK:
            BLOCKS: tl.constexpr = TILE_COLUMNS // BLOCK
            block = column_tile * BLOCKS + tl.arange(0, BLOCKS)
        else:
            BLOCKS: tl.constexpr = 1
            block = column_tile // (BLOCK // TILE_COLUMNS) + tl.arange(0, 1)
        if MASK_ROWS or MASK_COLUMNS:
            codes = tl.load(place, mask=is_row & (pair < PAIRS)[None, :], other=0)
        else:
            codes = tl.load(place)
        GRID_COLUMNS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
        BLOCK_ROWS: tl.constexpr = CODEC.block_rows
        PART_ROWS: tl.constexpr = CODEC.part_rows
        place = SCALES + expert.to(tl.int64) * grid_size(ROWS, COLUMNS, CODEC)
        if BLOCK_ROWS % TILE_ROWS == 0 and PART_ROWS % BLOCK_ROWS == 0 and TILE_COLUMNS <= BLOCK:
            # one scale for the whole tile
            place += row_tile // (BLOCK_ROWS // TILE_ROWS) * GRID_COLUMNS + column_tile // (BLOCK // TILE_COLUMNS)
            scale = tl.load(place + tl.zeros((1, 1), tl.int32))
        else:
            place = place + scale_row(row, CODEC)[:, None] * GRID_COLUMNS + block[None, :]
            if MASK_ROWS or MASK_COLUMNS:
                scale = tl.load(place, mask=is_row & (block < GRID_COLUMNS)[None, :], other=0)
            else:
                scale = tl.load(place)
        UNIT: tl.constexpr = CODEC.unit
        KIND: tl.constexpr = CODEC.scale
        scale = as_scale(scale, KIND) * (1 / UNIT)
        codes = tl.reshape(codes, (TILE_ROWS, BLOCKS, TILE_COLUMNS // (2 * BLOCKS)))
        first, second = CODEC.decode(codes, scale[:, :, None], CODEC, DTYPE)
        return tl.reshape(tl.join(first, second), (TILE_ROWS, TILE_COLUMNS))


@triton.jit
def grid_size(ROWS: tl.constexpr, COLUMNS: tl.constexpr, CODEC: tl.constexpr):
    """Number of scales of a matrix."""
    PART: tl.constexpr = CODEC.part_rows
    BLOCK_ROWS: tl.constexpr = CODEC.block_rows
    BLOCK_COLUMNS: tl.constexpr = CODEC.block_columns
    GRID_ROWS: tl.constexpr = (ROWS // PART) * ((PART + BLOCK_ROWS - 1) // BLOCK_ROWS)
    return GRID_ROWS * ((COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS)


@triton.jit
def weight_block(
    W,
    SCALES,
    expert,
    row,
    column_tile,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`(rows, TILE_COLUMNS)` values of codes, and one scale per row: the columns of a tile are in one block."""
    PAIRS: tl.constexpr = COLUMNS // 2
    pair = column_tile * (TILE_COLUMNS // 2) + tl.arange(0, TILE_COLUMNS // 2)
    place = W + expert.to(tl.int64) * (ROWS * PAIRS) + row[:, None] * PAIRS + pair[None, :]
    BLOCK: tl.constexpr = CODEC.block_columns
    GRID_COLUMNS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    scale_place = SCALES + expert.to(tl.int64) * grid_size(ROWS, COLUMNS, CODEC)
    scale_place = scale_place + scale_row(row, CODEC) * GRID_COLUMNS
    scale_place += column_tile // (BLOCK // TILE_COLUMNS)
    is_row = row < ROWS
    scale = tl.load(scale_place, mask=is_row, other=0) if MASK_ROWS else tl.load(scale_place)
    if MASK_ROWS or MASK_COLUMNS:
        codes = tl.load(place, mask=is_row[:, None] & (pair < PAIRS)[None, :], other=0)
    else:
        codes = tl.load(place)
    first, second = CODEC.look_up(codes, CODEC, DTYPE)
    values = tl.reshape(tl.join(first, second), (row.shape[0], TILE_COLUMNS))
    UNIT: tl.constexpr = CODEC.unit
    KIND: tl.constexpr = CODEC.scale
    return values, as_scale(scale, KIND) * (1 / UNIT)


@triton.jit
def load_scales(
    ABSMAX,
    NESTED,
    OFFSET,
    MAP,
    expert,
    block,
    mask,
    NUM_BLOCKS: tl.constexpr,
    IS_NESTED: tl.constexpr,
):
    """fp32 block scales of one expert; masked elements are arbitrary but finite."""
    place = ABSMAX + expert.to(tl.int64) * NUM_BLOCKS + block
    scale = tl.load(place, mask=mask, other=0)
    if not IS_NESTED:
        scale = as_scale(scale, "fp32")
    else:
        NUM_NESTED: tl.constexpr = (NUM_BLOCKS + _NESTED_BLOCKSIZE - 1) // _NESTED_BLOCKSIZE
        place = NESTED + expert * NUM_NESTED + block // _NESTED_BLOCKSIZE
        nested = as_scale(tl.load(place, mask=mask, other=0), "fp32")
        scale = tl.load(MAP + scale.to(tl.int32)) * nested + as_scale(tl.load(OFFSET + expert), "fp32")
    return scale


@triton.jit
def with_second_level(bits, whole, LEVEL: tl.constexpr):
    """fp32 block scales from their FP8 bits and the bits of the fp32 scale of the part."""
    scale = e4m3_value(bits.to(tl.int32), tl.float32)
    whole = as_scale(whole, "fp32")
    return scale * whole if LEVEL == "times" else tl.div_rn(scale, whole)


@triton.jit
def block_scales(
    SCALES,
    NESTED,
    OFFSET,
    MAP,
    expert,
    row,
    block,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_NESTED: tl.constexpr,
    CODEC: tl.constexpr,
):
    """`(rows, blocks)` scales in fp32 of some rows of one expert; finite values outside of the matrix."""
    BLOCK: tl.constexpr = CODEC.block_columns
    GRID_COLUMNS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    is_block = (row < ROWS)[:, None] & (block < GRID_COLUMNS)[None, :]
    place = scale_row(row, CODEC)[:, None] * GRID_COLUMNS + block[None, :]
    LEVEL: tl.constexpr = CODEC.second_level
    if LEVEL == "map":
        return load_scales(
            SCALES, NESTED, OFFSET, MAP, expert, place, is_block, grid_size(ROWS, COLUMNS, CODEC), IS_NESTED
        )
    elif IS_NESTED:
        PART: tl.constexpr = CODEC.part_rows
        bits = tl.load(SCALES + expert.to(tl.int64) * grid_size(ROWS, COLUMNS, CODEC) + place, mask=is_block, other=0)
        whole = tl.load(NESTED + expert * (ROWS // PART) + row // PART, mask=row < ROWS, other=_ONE)
        return with_second_level(bits, whole[:, None], LEVEL)
    else:
        bits = tl.load(SCALES + expert.to(tl.int64) * grid_size(ROWS, COLUMNS, CODEC) + place, mask=is_block, other=0)
        KIND: tl.constexpr = CODEC.scale
        return as_scale(bits, KIND)


@triton.jit(do_not_specialize=["first_expert", "first_block", "first_column"])
def _decode_flat_kernel(
    CODES,
    ABSMAX,
    NESTED,
    OFFSET,
    MAP,
    OUT,
    first_expert,
    first_block,
    first_column,
    NUMEL: tl.constexpr,
    OUT_NUMEL: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    CODEC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid: groups of `BLOCKS` blocks of a flattened matrix; experts. CODES `(E, bytes)`, OUT `(experts, OUT_NUMEL)`.

    OUT is the matrix starting at `first_block`, or `WIDTH` columns of it starting at `first_column`.
    """
    NUM_BYTES: tl.constexpr = (NUMEL + 1) // 2
    NUM_BLOCKS: tl.constexpr = (NUMEL + BLOCKSIZE - 1) // BLOCKSIZE
    BLOCK_BYTES: tl.constexpr = BLOCKSIZE // 2
    expert = first_expert + tl.program_id(1)
    block = first_block + tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    codes = tl.load(CODES + expert.to(tl.int64) * NUM_BYTES + byte, mask=byte < NUM_BYTES, other=0)
    scale = load_scales(ABSMAX, NESTED, OFFSET, MAP, expert, block, block < NUM_BLOCKS, NUM_BLOCKS, IS_NESTED)
    first, second = CODEC.decode(codes, scale[:, None], CODEC, tl.float32)
    weights = tl.interleave(first, second).to(OUT.dtype.element_ty)
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    if WIDTH == COLUMNS:
        place -= first_block * BLOCKSIZE
        is_out = place < OUT_NUMEL
    else:
        column = place % COLUMNS - first_column
        is_out = (place < NUMEL) & (column >= 0) & (column < WIDTH)
        place = place // COLUMNS * WIDTH + column
    tl.store(OUT + tl.program_id(1).to(tl.int64) * OUT_NUMEL + place, weights, mask=is_out)


@triton.jit(do_not_specialize=["first_expert", "first_row_tile", "first_column_tile"])
def _decode_grid_kernel(
    CODES,
    SCALES,
    OUT,
    first_expert,
    first_row_tile,
    first_column_tile,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    CODEC: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Grid: tiles of a matrix, row by row; experts.

    CODES `(E, ROWS, COLUMNS / 2)` pairs, SCALES `(E, R, C)`, OUT `(experts, OUT_ROWS, OUT_COLUMNS)`, which starts at a
    tile.
    """
    TILES: tl.constexpr = (OUT_COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    expert = first_expert + tl.program_id(1)
    row_tile, column_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    row = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    tile = weight_tile(
        CODES, SCALES, expert, first_row_tile + row_tile, first_column_tile + column_tile,
        ROWS, COLUMNS, TILE_ROWS, TILE_COLUMNS, ROWS % TILE_ROWS != 0, COLUMNS % TILE_COLUMNS != 0, CODEC, tl.float32,
    )  # fmt: skip
    column = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    place = OUT + tl.program_id(1).to(tl.int64) * (OUT_ROWS * OUT_COLUMNS)
    place += row[:, None] * OUT_COLUMNS + column[None, :]
    tl.store(place, tile.to(OUT.dtype.element_ty), mask=(row < OUT_ROWS)[:, None] & (column < OUT_COLUMNS)[None, :])


DECODE_BYTES = 4096
PART_GRANULE = 256
"""Parts of a matrix start at multiples of this number of rows or columns."""


def kernel_tensors(weight: PackedWeight) -> tuple[torch.Tensor, ...]:
    """Codes, scales, second-level scales and dynamic map of a packed weight; the codes replace absent tensors."""
    first, tensors = _pairs_of_codes(weight), weight.tensors[1:]
    if _has_map(weight):
        return (first, *tensors, dynamic_map(first.device))
    return (first, *tensors, *[first] * (4 - len(tensors)))


def _pairs_of_codes(weight: PackedWeight) -> torch.Tensor:
    """Codes in pairs, as read by kernels: a byte, or a 16-bit integer for one-byte codes.

    Created on each use: a cached view could refer to memory that FSDP2 or DeepSpeed has moved or freed.
    """
    codes = weight.tensors[0]
    return codes.view(torch.int16) if weight.is_packed and weight.storage.codes_per_byte == 1 else codes


def _has_map(weight: PackedWeight) -> bool:
    return weight.is_nested and weight.storage.second_level == "map"


def frozen_tensors(*weights: PackedWeight) -> tuple[torch.Tensor, ...]:
    """All tensors of these weights that kernels read."""
    tensors = tuple(tensor for weight in weights for tensor in weight.tensors)
    if any(_has_map(weight) for weight in weights):
        tensors += (dynamic_map(tensors[0].device),)
    return tensors


@triton.jit
def _plain_scales_kernel(ABSMAX, NESTED, OFFSET, MAP, OUT, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(1)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = load_scales(ABSMAX, NESTED, OFFSET, MAP, expert, block, block < NUM_BLOCKS, NUM_BLOCKS, True)
    tl.store(OUT + expert.to(tl.int64) * NUM_BLOCKS + block, scale, mask=block < NUM_BLOCKS)


@triton.jit
def _plain_scales_of_parts_kernel(
    SCALES,
    WHOLE,
    OUT,
    NUM_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(1)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = expert.to(tl.int64) * NUM_BLOCKS + block
    bits = tl.load(SCALES + place, mask=block < NUM_BLOCKS, other=0)
    part = block // (NUM_BLOCKS // PARTS)
    whole = tl.load(WHOLE + expert * PARTS + part, mask=block < NUM_BLOCKS, other=_ONE)
    tl.store(OUT + place, with_second_level(bits, whole, LEVEL), mask=block < NUM_BLOCKS)


def with_plain_scales(weight: PackedWeight) -> PackedWeight:
    """The weight as read by products: codes in pairs, and nested (two-level) scales decoded to fp32."""
    codes = _pairs_of_codes(weight)
    if not weight.is_nested:
        return weight._replace(tensors=(codes, *weight.tensors[1:]))
    scales = weight.tensors[1]
    plain = allocate(scales.shape, torch.float32, scales.device)
    num_blocks = scales[0].numel()
    grid = (cdiv(num_blocks, 1024), weight.num_experts)
    if _has_map(weight):
        tensors = (*kernel_tensors(weight)[1:], plain)
        launch(_plain_scales_kernel, grid, tensors, (), enable_fp_fusion=False, NUM_BLOCKS=num_blocks, BLOCK=1024)
    else:
        launch(
            _plain_scales_of_parts_kernel,
            grid,
            (*weight.tensors[1:], plain),
            (),
            enable_fp_fusion=False,
            NUM_BLOCKS=num_blocks,
            PARTS=weight.parts,
            LEVEL=weight.storage.second_level,
            BLOCK=1024,
        )
    return weight._replace(tensors=(codes, plain))


class _Part(NamedTuple):
    """A rectangle of a matrix."""

    first_row: int
    first_column: int
    rows: int
    columns: int


def decode(
    weight: PackedWeight, first_expert: int, num_experts: int, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`(num_experts, rows, columns)` weights, bit-identical to `QuantizedStack.decode`; written to `out` if given."""
    if out is None:
        out = allocate((num_experts, weight.rows, weight.columns), dtype, weight.tensors[0].device)
    _decode(weight, first_expert, num_experts, _Part(0, 0, weight.rows, weight.columns), out)
    return out


def decode_part(
    weight: PackedWeight, expert: int, of_rows: bool, first: int, count: int, out: torch.Tensor
) -> torch.Tensor:
    """Decodes some rows of one expert, `(count, columns)`, or some columns, `(rows, count)`.

    Args:
        weight: the stack.
        expert: index of the expert.
        of_rows: whether the part is a range of rows.
        first: first row or column, a multiple of `PART_GRANULE`; for rows of a format with flat blocks, also of the
            blocksize.
        count: number of rows or columns.
        out: contiguous tensor with at least as many elements.
    """
    part = _Part(first, 0, count, weight.columns) if of_rows else _Part(0, first, weight.rows, count)
    _decode(weight, expert, 1, part, out)
    return out


def _decode(weight: PackedWeight, first_expert: int, num_experts: int, part: _Part, out: torch.Tensor) -> None:
    codec = codec_of(weight, torch.float32)
    by = _decode_grid if weight.storage.flat_blocksize is None else _decode_flat
    by(weight, codec, first_expert, num_experts, part, out)


def _decode_flat(
    weight: PackedWeight, codec: Codec, first_expert: int, num_experts: int, part: _Part, out: torch.Tensor
) -> None:
    """For formats with blocks of the flattened matrix."""
    numel, blocksize = weight.rows * weight.columns, weight.storage.flat_blocksize
    num_blocks = cdiv(part.rows * weight.columns, blocksize)
    blocks = min(next_power_of_2(num_blocks), max(1, 2 * DECODE_BYTES // blocksize))
    launch(
        _decode_flat_kernel,
        (cdiv(num_blocks, blocks), num_experts),
        (*kernel_tensors(weight), out),
        (first_expert, part.first_row * weight.columns // blocksize, part.first_column),
        NUMEL=numel,
        OUT_NUMEL=part.rows * part.columns,
        COLUMNS=weight.columns,
        WIDTH=part.columns,
        BLOCKSIZE=blocksize,
        IS_NESTED=weight.is_nested,
        CODEC=codec,
        BLOCKS=blocks,
        enable_fp_fusion=False,
    )


def _decode_grid(
    weight: PackedWeight, codec: Codec, first_expert: int, num_experts: int, part: _Part, out: torch.Tensor
) -> None:
    """For formats with a grid of blocks."""
    tile_columns = min(next_power_of_2(weight.columns), 256)
    tile_rows = max(1, min(next_power_of_2(weight.rows), 2 * DECODE_BYTES // tile_columns))
    if part.first_row or part.rows < weight.rows:
        tile_rows = min(tile_rows, PART_GRANULE)
    weight = with_plain_scales(weight)
    launch(
        _decode_grid_kernel,
        (cdiv(part.rows, tile_rows) * cdiv(part.columns, tile_columns), num_experts),
        (*weight.tensors, out),
        (first_expert, part.first_row // tile_rows, part.first_column // tile_columns),
        ROWS=weight.rows,
        COLUMNS=weight.columns,
        OUT_ROWS=part.rows,
        OUT_COLUMNS=part.columns,
        CODEC=codec,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        enable_fp_fusion=False,
    )
