"""A packed weight as the left operand of asynchronous matrix instructions: decoded in the registers that they read.

A warp group multiplies 64 columns of the result, in the order of `column_of`. Its threads read from shared memory
exactly the codes of the weights that they pass on to the instruction, so decoded weights never leave the registers.
Names of layouts in comments: q is a thread of four, r one of eight such fours, w the warp.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .codec import as_pairs, split_pairs

GROUP_N = tl.constexpr(64)
"""Columns of the result that a warp group multiplies: the rows of its left operand."""
STEP_K = tl.constexpr(64)
"""Length of a step along the contraction."""
PAIRS = tl.constexpr(32)
"""Pairs of codes in `GROUP_N` columns or in a step."""
_PACK_PAIRS = tl.constexpr("prmt.b32 $0, $1, $2, $3;")
_PACK_BYTES = tl.constexpr(
    "{ .reg .b32 low, high; prmt.b32 low, $1, $2, $5; prmt.b32 high, $3, $4, $5; prmt.b32 $0, low, high, 0x5410; }"
)


@gluon.jit
def column_of(row):
    """Column of the result for a row of the left operand.

    In each 16 rows, rows r and r + 8 are neighboring columns: a thread has both, so it can store two results at once,
    and take both codes of a pair along the columns.
    """
    return row // 16 * 16 + row % 8 * 2 + row // 8 % 2


@gluon.constexpr_function
def _bases(along_columns):
    """Bases of registers, lanes and warps for codes `(64, 32)` in the registers of the left operand.

    The first dimension is the row of the operand, 16 w + r or that + 8, and pair q + 4 j is in the contraction. For
    pairs along the columns of the result, it is the contraction, 2 q + 8 j or that + 1, and the pair is 8 w + r.
    """
    if along_columns:
        registers, lanes = [[8, 0], [0, 4], [0, 8], [0, 16]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
        warps = [[16, 0], [32, 0]]
    else:
        registers, lanes = [[1, 0], [8, 0], [16, 0], [32, 0]], [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]]
        warps = [[0, 8], [0, 16]]
    return registers, lanes, warps


@gluon.constexpr_function
def _codes_layout(along_columns, groups):
    """The same for codes in groups of neighboring pairs, `(64, groups, 32 / groups)`."""
    size = PAIRS.value // groups
    bases = [[[row, pair // size, pair % size] for row, pair in part] for part in _bases(along_columns)]
    return gl.DistributedLinearLayout(*bases, [], [64, groups, size])


@gluon.constexpr_function
def _parts_layout(along_columns, blocks):
    """The same for the scales of these codes, `(lines, blocks, 2)`, see `scale_parts`."""
    size, step = PAIRS.value // blocks, 1 if along_columns else 2
    bases = [[[row // step, pair // size, 0] for row, pair in part] for part in _bases(along_columns)]
    bases[0] = [[0, 0, 1]] + [base for base in bases[0] if any(base)]
    return gl.DistributedLinearLayout(*bases, [], [64 // step, blocks, 2])


@gluon.constexpr_function
def _constraints(results):
    return ",".join(["=r"] * results + ["r"] * (1 + 2 * results))


@gluon.jit
def scale_parts(scale, ALONG_COLUMNS: tl.constexpr, CODEC: tl.constexpr, DTYPE: tl.constexpr):
    """`(lines, blocks, 2)` int32: pairs of scales in DTYPE, and of their rounding errors, as read by `left_operand`.

    Args:
        scale: `(rows, blocks)` in fp32. A line is one row twice or, for pairs along the columns of the result, two
            neighboring rows.
    """
    scale = scale * CODEC.power
    coarse = scale.to(DTYPE)
    fine = (scale - coarse.to(tl.float32)).to(DTYPE)
    if ALONG_COLUMNS:
        return gl.join(as_pairs(coarse), as_pairs(fine))
    else:
        ROWS: tl.constexpr = scale.shape[0]
        BLOCKS: tl.constexpr = scale.shape[1]
        coarse, next_coarse = gl.split(as_pairs(coarse).reshape([ROWS // 2, 2, BLOCKS]).permute([0, 2, 1]))
        fine, next_fine = gl.split(as_pairs(fine).reshape([ROWS // 2, 2, BLOCKS]).permute([0, 2, 1]))
        LOW: tl.constexpr = 0xFFFF
        return gl.join((coarse & LOW) | (next_coarse << 16), (fine & LOW) | (next_fine << 16))


@gluon.jit
def _load_codes(place, ALONG_COLUMNS: tl.constexpr, BLOCKS: tl.constexpr):
    """Pairs of codes `(64, BLOCKS, 32 / BLOCKS)`, of which each thread picks its own from words of 32 bits."""
    WORDS: tl.constexpr = place.shape[1]
    PICKED: tl.constexpr = _codes_layout(ALONG_COLUMNS, WORDS)
    words = gl.expand_dims(place.load(gl.SliceLayout(2, PICKED)), 2)
    part = gl.arange(0, PAIRS // WORDS, gl.SliceLayout(0, gl.SliceLayout(0, PICKED)))
    part = gl.expand_dims(gl.expand_dims(part, 0), 0)
    if WORDS == 8:
        # byte `part` of two words
        codes = gl.inline_asm_elementwise(
            _PACK_BYTES, "=r,r,r,r,r,r,r,r,r", [words, part * 0x11 + 0x40], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        codes = gl.inline_asm_elementwise(
            _PACK_PAIRS, "=r,r,r,r,r", [words, part * 0x2222 + 0x5410], dtype=tl.int16, is_pure=True, pack=2
        )
    LAYOUT: tl.constexpr = _codes_layout(ALONG_COLUMNS, BLOCKS)
    return gl.convert_layout(codes.reshape([64, BLOCKS, PAIRS // BLOCKS]), LAYOUT, assert_trivial=True)


@gluon.jit
def left_operand(
    codes_place,
    parts_place,
    ALONG_COLUMNS: tl.constexpr,
    CODEC: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`(64, 64)` weights, columns of the result times contraction, in the registers of the left operand.

    Args:
        codes_place: shared memory of 32 pairs of codes in each of 64 rows, as `(64, words)` int32: rows of the operand
            times pairs along the contraction or, for pairs along the columns, contraction times pairs.
        parts_place: shared memory of the `scale_parts`, `(lines, blocks, 2)`.
        LAYOUT: layout of the left operand.
    """
    BLOCKS: tl.constexpr = parts_place.shape[1]
    CODES: tl.constexpr = _codes_layout(ALONG_COLUMNS, BLOCKS)
    codes = _load_codes(codes_place, ALONG_COLUMNS, BLOCKS)
    coarse, fine = gl.split(parts_place.load(_parts_layout(ALONG_COLUMNS, BLOCKS)))
    if not ALONG_COLUMNS:
        # the same scales for both results of two pairs
        coarse = gl.join(coarse, coarse).permute([0, 2, 1]).reshape([64, BLOCKS])
        fine = gl.join(fine, fine).permute([0, 2, 1]).reshape([64, BLOCKS])
    coarse = gl.expand_dims(gl.convert_layout(coarse, gl.SliceLayout(2, CODES), assert_trivial=True), 2)
    fine = gl.expand_dims(gl.convert_layout(fine, gl.SliceLayout(2, CODES), assert_trivial=True), 2)
    ASSEMBLY: tl.constexpr = CODEC.scaled_assembly if ALONG_COLUMNS else CODEC.crossed_assembly
    RESULTS: tl.constexpr = 4 if codes.dtype.primitive_bitwidth == 8 else 2
    CONSTRAINTS: tl.constexpr = _constraints(RESULTS)
    pairs = gl.inline_asm_elementwise(
        ASSEMBLY, CONSTRAINTS, [codes, coarse, fine], dtype=tl.int32, is_pure=True, pack=RESULTS
    )
    first, second = split_pairs(pairs, DTYPE)
    weights = gl.join(first, second)
    if ALONG_COLUMNS:
        weights = weights.reshape([64, 64])
    else:
        # (half of the contraction, first or second code, w, r, neighbors in the contraction)
        weights = weights.reshape([32, 2, 4, 8, 2]).permute([2, 1, 3, 0, 4]).reshape([64, 64])
    return gl.convert_layout(weights, LAYOUT, assert_trivial=True)
