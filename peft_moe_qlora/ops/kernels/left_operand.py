"""A packed weight as the left operand of asynchronous matrix instructions: decoded in the registers that they read.

A warp group multiplies 64 columns of the result, in the order of `column_of`. Its threads read from shared memory the
codes of the weights that they pass on to the instruction, so decoded weights never leave the registers.
Names of layouts in comments: q is a thread of four, r one of eight such fours, w the warp.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .byte_table import look_up_bytes
from .codec import as_pairs, split_pairs

GROUP_N = tl.constexpr(64)
"""Columns of the result that a warp group multiplies: the rows of its left operand."""
STEP_K = tl.constexpr(64)
"""Length of a step along the contraction."""
PAIRS = tl.constexpr(32)
"""Pairs of codes in `GROUP_N` columns or in a step."""
_PICK_PAIRS = tl.constexpr("prmt.b32 $0, $1, $2, $3;")


@gluon.jit
def column_of(row):
    """Column of the result for a row of the left operand.

    Rows r and r + 8 of 16 are neighboring columns, so a thread takes both codes of a pair along the columns. Two warps
    alternate, so that the pairs of threads r of both are in one word, with number r (16 bits for 4-bit codes).
    """
    return row // 32 * 32 + row % 8 * 4 + row // 16 % 2 * 2 + row // 8 % 2


@gluon.constexpr_function
def _bases(along_columns):
    """Bases of registers, lanes and warps for codes `(64, 32)` in the registers of the left operand.

    The first dimension is the row of the operand, 16 w + r or that + 8, and pair q + 4 j is in the contraction. For
    pairs along the columns of the result, it is the contraction, 2 q + 8 j or that + 1, and the pair is 2 r for the
    first warp, 1, 16 and 17 more for the next ones.
    """
    if along_columns:
        registers, lanes = [[8, 0], [0, 4], [0, 8], [0, 16]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
        warps = [[16, 0], [32, 0]]
    else:
        registers, lanes = [[1, 0], [8, 0], [16, 0], [32, 0]], [[2, 0], [4, 0], [0, 2], [0, 4], [0, 8]]
        warps = [[0, 1], [0, 16]]
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
def _scale(dtype):
    """PTX: a pair of values times `coarse + fine`, rounded once."""
    kind = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    # adding -0 does not change a product
    return (
        "{ .reg .b32 rest, minus_zero; mov.b32 minus_zero, 0x80008000; "
        f"fma.rn.{kind} rest, $1, $3, minus_zero; fma.rn.{kind} $0, $1, $2, rest; }}"
    )


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
def load_codes(place, ALONG_COLUMNS: tl.constexpr):
    """Words with the codes that a thread needs for its part of `left_operand`.

    Args:
        place: shared memory of 32 pairs of codes in each of 64 rows, as `(64, words)` integers: rows of the operand
            times pairs along the contraction or, for pairs along the columns, contraction times pairs. In the latter
            case a word has two pairs: threads of even warps need the first one.
    """
    return place.load(gl.SliceLayout(2, _codes_layout(ALONG_COLUMNS, place.shape[1])))


@gluon.jit
def _along(DIM: tl.constexpr, LAYOUT: tl.constexpr):
    """0, 1, ... along one of three dimensions of a layout."""
    FIRST: tl.constexpr = 1 if DIM == 0 else 0
    SECOND: tl.constexpr = 1 if DIM == 2 else 2
    index = gl.arange(0, LAYOUT.shape[DIM], gl.SliceLayout(FIRST, gl.SliceLayout(SECOND, LAYOUT)))
    return gl.expand_dims(gl.expand_dims(index, FIRST), SECOND)


@gluon.jit
def _pick_values(words, ALONG_COLUMNS: tl.constexpr):
    """Pairs of values of one-byte pairs, `(64, words, pairs in a word)`, of which each thread picks its own."""
    PICKED: tl.constexpr = _codes_layout(ALONG_COLUMNS, words.shape[1])
    row, pair = _along(0, PICKED), _along(2, PICKED)
    words = gl.expand_dims(words, 2)
    if ALONG_COLUMNS:
        return look_up_bytes(words, pair * 8, pair + row % 8 * 4, False)
    else:
        # two rows in a register
        return look_up_bytes(words, pair * 8 + row % 2 * 16, row // 2 % 4 + _along(1, PICKED) % 8 * 4, True)


@gluon.jit
def _pick_codes(words, ALONG_COLUMNS: tl.constexpr):
    """Two-byte pairs of codes, `(64, words, 2)`, of which each thread picks its own."""
    part = _along(2, _codes_layout(ALONG_COLUMNS, words.shape[1]))
    selector = part * 0x2222 + 0x5410
    return gl.inline_asm_elementwise(
        _PICK_PAIRS, "=r,r,r,r,r", [gl.expand_dims(words, 2), selector], dtype=tl.int16, is_pure=True, pack=2
    )


@gluon.jit
def left_operand(
    words,
    parts_place,
    ALONG_COLUMNS: tl.constexpr,
    CODEC: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`(64, 64)` weights, columns of the result times contraction, in the registers of the left operand.

    Args:
        words: codes, from `load_codes`.
        parts_place: shared memory of the `scale_parts`, `(lines, blocks, 2)`.
        LAYOUT: layout of the left operand.
    """
    BLOCKS: tl.constexpr = parts_place.shape[1]
    CODES: tl.constexpr = _codes_layout(ALONG_COLUMNS, BLOCKS)
    coarse, fine = gl.split(parts_place.load(_parts_layout(ALONG_COLUMNS, BLOCKS)))
    if not ALONG_COLUMNS:
        # the same scales for both results of two pairs
        coarse = gl.join(coarse, coarse).permute([0, 2, 1]).reshape([64, BLOCKS])
        fine = gl.join(fine, fine).permute([0, 2, 1]).reshape([64, BLOCKS])
    coarse = gl.expand_dims(gl.convert_layout(coarse, gl.SliceLayout(2, CODES), assert_trivial=True), 2)
    fine = gl.expand_dims(gl.convert_layout(fine, gl.SliceLayout(2, CODES), assert_trivial=True), 2)
    if CODEC.has_byte_pairs:
        pairs = _pick_values(words, ALONG_COLUMNS)
        pairs = gl.convert_layout(pairs.reshape([64, BLOCKS, PAIRS // BLOCKS]), CODES, assert_trivial=True)
        SCALE: tl.constexpr = _scale(DTYPE)
        pairs = gl.inline_asm_elementwise(
            SCALE, "=r,r,r,r", [pairs, coarse, fine], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        codes = _pick_codes(words, ALONG_COLUMNS)
        codes = gl.convert_layout(codes.reshape([64, BLOCKS, PAIRS // BLOCKS]), CODES, assert_trivial=True)
        ASSEMBLY: tl.constexpr = CODEC.scaled_assembly if ALONG_COLUMNS else CODEC.crossed_assembly
        pairs = gl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,r,r,r,r,r", [codes, coarse, fine], dtype=tl.int32, is_pure=True, pack=2
        )
    first, second = split_pairs(pairs, DTYPE)
    weights = gl.join(first, second)
    if ALONG_COLUMNS:
        weights = weights.reshape([64, 64])
    else:
        # half of the contraction, first or second code, (pair of warps, r, warp), neighbors in the contraction
        weights = weights.reshape([32, 2, 2, 8, 2, 2]).permute([2, 4, 1, 3, 0, 5]).reshape([64, 64])
    return gl.convert_layout(weights, LAYOUT, assert_trivial=True)
