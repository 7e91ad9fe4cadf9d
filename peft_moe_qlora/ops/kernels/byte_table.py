"""A table of the values of all bytes in shared memory, for formats with two codes in a byte.

One load gives both values as a pair of 16-bit numbers, where look-ups in registers need four permutes and more. Each
bank has its own copy, in which the threads of a warp that use different banks find any bytes without conflicts.

The table is a variable of PTX: before Triton 3.7, Gluon has no indexed loads from shared memory. Such variables lie
before the memory that Triton allocates, in which operands of matrix instructions must start at multiples of 1,024
bytes; so the size of the table must be one.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROW_BYTES = tl.constexpr(128)
"""Bytes of the copies of one pair, in the 32 banks."""
TABLE_BYTES = 256 * ROW_BYTES.value
_DECLARE = tl.constexpr(f".shared .align 16 .b8 pairs_of_bytes[{TABLE_BYTES}]; mov.u32 $0, $1;")
_STORE = tl.constexpr(
    "{ .reg .b32 at; mov.u32 at, pairs_of_bytes; add.u32 at, at, $1; st.shared.v4.b32 [at], {$2, $2, $2, $2}; "
    "mov.u32 $0, 0; }"
)
_THREADS = tl.constexpr(gl.DistributedLinearLayout([], [[1 << i] for i in range(5)], [[32], [64]], [], [128]))
# bytes times parts of 16 bytes of their copies
_COPIES = tl.constexpr(
    gl.DistributedLinearLayout(
        [[128, 0], [0, 1], [0, 2], [0, 4]], [[1 << i, 0] for i in range(5)], [[32, 0], [64, 0]], [], [256, 8]
    )
)


@gluon.jit
def store_byte_table(CODEC: tl.constexpr):
    """Stores the table of a codec with two codes in a byte; must be called once in a program, by four warps."""
    ASSEMBLY: tl.constexpr = CODEC.assembly
    byte = gl.expand_dims(gl.arange(0, 256, gl.SliceLayout(1, _COPIES)), 1)
    part = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, _COPIES)), 0)
    codes = (byte + part * 0).to(tl.int8)
    pairs = gl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=4)
    thread = gl.arange(0, 128, _THREADS)
    gl.inline_asm_elementwise(_DECLARE, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
    # neighboring threads store other parts, in other banks
    place = byte * ROW_BYTES + (part + byte) % 8 * 16
    gl.inline_asm_elementwise(_STORE, "=r,r,r", [place, pairs], dtype=tl.int32, is_pure=False, pack=1)


def _look_up(to: str, word: int, rotation: int, bank: int) -> str:
    """PTX that looks up a byte. The rotation moves it to bits 7 to 14, where it is the offset of a row."""
    return (
        f"shf.l.wrap.b32 {to}, ${word}, ${word}, ${rotation}; "
        f"lop3.b32 {to}, {to}, {255 * ROW_BYTES.value:#x}, ${bank}, 0xea; "
        f"add.u32 {to}, {to}, table; ld.shared.b32 {to}, [{to}]; "
    )


_TABLE = ".reg .b32 table, one, other; mov.u32 table, pairs_of_bytes; "
_LOOK_UP = tl.constexpr("{ " + _TABLE + _look_up("one", 1, 2, 3) + "mov.b32 $0, one; }")
_LOOK_UP_CROSSED = tl.constexpr(
    "{ " + _TABLE + _look_up("one", 2, 3, 5) + _look_up("other", 2, 4, 6)
    + "prmt.b32 $0, one, other, 0x5410; prmt.b32 $1, one, other, 0x7632; }"
)  # fmt: skip


@gluon.jit
def look_up_bytes(words, bit, lane, CROSSED: tl.constexpr):
    """Pairs of values as int32, of bytes of words.

    Args:
        words: int32; if crossed, int16, of which two neighboring elements of a thread share a register.
        bit: position of the byte in the register.
        lane: a number below 32 that is different for all threads of a warp.
        CROSSED: return the two first values of each two neighboring bytes of a thread, and then the two second ones.
    """
    # the lowest seven bits of an offset are in the row
    rotation = (7 - bit) & 31
    bank = lane * 4
    if CROSSED:
        return gl.inline_asm_elementwise(
            _LOOK_UP_CROSSED, "=r,=r,r,r,r,r,r", [words, rotation, bank], dtype=tl.int32, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            _LOOK_UP, "=r,r,r,r", [words, rotation, bank], dtype=tl.int32, is_pure=True, pack=1
        )
