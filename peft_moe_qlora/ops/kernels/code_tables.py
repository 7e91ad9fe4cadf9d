"""Decoding of 4-bit codes that index a table of values, with PTX for look-ups in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...quantization import QUANT_TYPES, code_values
from ...quantization.formats.mxfp4 import e2m1_values
from .codec import Decoder, as_pairs, register_decoder, split_pairs

_UNITS = {
    ("nf4", torch.bfloat16): 1.18852,
    ("nf4", torch.float16): 1.57519,
    ("fp4", torch.bfloat16): 1.03125,
    ("fp4", torch.float16): 1.03125,
}
"""Factors in [1, 2) for which the rounding errors of a table are small, for Gaussian weights in blocks of 64.

The mean of the errors matters most: if the mean of the activations is not zero, as after a gate that is mostly
positive, it accumulates over the contraction. For NF4 in bfloat16 it is 1e-5 relative to the weights (4.6e-4 without a
factor), and the root mean square is 1.0e-3 (1.4e-3). FP4 is exact.
"""


@triton.jit
def _select(nibbles, VALUES: tl.constexpr, DTYPE: tl.constexpr):
    out = tl.full(nibbles.shape, VALUES[0], DTYPE)
    for code in tl.static_range(1, 16):
        out = tl.where(nibbles == code, tl.full(nibbles.shape, VALUES[code], DTYPE), out)
    return out


@triton.jit
def look_up_codes(codes, CODEC: tl.constexpr, DTYPE: tl.constexpr):
    """Table values of the first and of the second code of each byte."""
    # Triton compares an attribute at compile time only through a constexpr variable
    ASSEMBLY: tl.constexpr = CODEC.assembly
    if ASSEMBLY == "":
        VALUES: tl.constexpr = CODEC.values
        SHIFT: tl.constexpr = CODEC.first_shift
        first = _select(((codes >> SHIFT) & 15).to(tl.int32), VALUES, DTYPE)
        second = _select(((codes >> (4 - SHIFT)) & 15).to(tl.int32), VALUES, DTYPE)
    elif tl.float32 == DTYPE:
        first, second = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        pairs = tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=4)
        first, second = split_pairs(pairs, DTYPE)
    return first, second


@triton.jit
def decode_codes(codes, scale, CODEC: tl.constexpr, DTYPE: tl.constexpr):
    """Weights of the first and of the second code of each byte, rounded once.

    `scale` is in fp32 and broadcasts to the shape of the codes; it is the block's scale divided by the table's unit.
    """
    ASSEMBLY: tl.constexpr = CODEC.scaled_assembly
    if ASSEMBLY == "":
        first, second = look_up_codes(codes, CODEC, DTYPE)
        first = (first.to(tl.float32) * scale).to(DTYPE)
        second = (second.to(tl.float32) * scale).to(DTYPE)
    else:
        coarse = scale.to(DTYPE)
        fine = (scale - coarse.to(tl.float32)).to(DTYPE)
        pairs = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [codes, as_pairs(coarse), as_pairs(fine)],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
        first, second = split_pairs(pairs, DTYPE)
    return first, second


_LOW_FIRST = {"e2m1": e2m1_values(torch.device("cpu")), "int4": torch.arange(-8, 8, dtype=torch.float32, device="cpu")}
"""Values of formats with the first code of a byte in its low half."""


@register_decoder(*QUANT_TYPES, *_LOW_FIRST)
def _table_decoder(codes: str, dtype: torch.dtype, on_nvidia: bool) -> Decoder:
    """The decoder of a format with a table, for a dtype."""
    unit = _UNITS.get((codes, dtype), 1.0)
    is_high_first = codes not in _LOW_FIRST
    exact = code_values(codes, torch.device("cpu")) if is_high_first else _LOW_FIRST[codes]
    values = (exact.double() * unit).to(dtype)
    assembly = scaled = ""
    if on_nvidia and dtype == torch.float32:
        assembly = _shuffle_assembly(values, is_high_first)
    elif on_nvidia:
        assembly, scaled = (_permute_assembly(values, is_scaled, is_high_first) for is_scaled in (False, True))
    return Decoder(
        look_up_codes,
        decode_codes,
        first_shift=4 if is_high_first else 0,
        values=tuple(values.tolist()),
        assembly=assembly,
        scaled_assembly=scaled,
        unit=unit,
    )


def _permute_assembly(values: torch.Tensor, is_scaled: bool, is_high_first: bool) -> str:
    """PTX that looks up 8 codes in a table of 16 two-byte values, in registers.

    Operand 4 contains four bytes; results 0 to 3 are the pairs of values of their first and second codes. If scaled,
    each pair is multiplied by `coarse + fine` with one rounding, as `fma(value, coarse, value * fine)`. Operands 5 to
    8 are pairs of the coarse scale, 9 to 12 of the fine scale.

    `prmt.b32 d, a, b, s` selects each byte of d from the eight bytes of a and b by a nibble of s with a clear top bit.
    The packed codes, masked to three bits each, are such selectors: one permute looks up four codes in the first eight
    entries of the table, one in the last eight, and a third selects between the two by the top bit of each code. This
    is done for the low bytes (0) and the high bytes (1) of the values; the last permutes combine them.

    Permutes, shifts and logic use the same pipe, which limits products with few rows. A multiplication, which uses
    another pipe, therefore replaces a shift by 16. An instruction has one immediate operand; ptxas would move a second
    constant that is uniform across threads into a register before each permute. Combining it with a zero that ptxas
    considers thread-dependent keeps it in a register.
    """
    patterns = [pattern & 0xFFFF for pattern in values.view(torch.int16).tolist()]

    def word(byte: int, first: int) -> str:
        return "0x" + "".join(f"{pattern >> 8 * byte & 0xFF:02x}" for pattern in reversed(patterns[first : first + 4]))

    names = [
        "zero",
        "other_lanes",
        "two_16",
        "codes_a",
        "codes_b",
        "halves_a",
        "halves_b",
        "pair",
        "rest",
        "minus_zero",
    ]
    lines = [
        "mov.u32 zero, %lanemask_lt;",
        "mov.u32 other_lanes, %lanemask_ge;",
        "and.b32 zero, zero, other_lanes;",
        "or.b32 two_16, zero, 0x10000;",
        "and.b32 codes_a, $4, 0x77777777;",
        # selects the half of the table by the top bit of each code: selector i or i + 4
        "shr.u32 halves_a, $4, 1;",
        "and.b32 halves_a, halves_a, 0x44444444;",
        "or.b32 halves_a, halves_a, 0x32103210;",
        "mul.hi.u32 codes_b, codes_a, two_16;",
        "mul.hi.u32 halves_b, halves_a, two_16;",
        # adding -0 does not change a product
        "mov.b32 minus_zero, 0x80008000;",
    ]
    for byte in range(2):
        for part, first in (("first", 0), ("last", 8)):
            names.append(f"{part}{byte}")
            lines.append(f"or.b32 {part}{byte}, zero, {word(byte, first)};")
    packed_type = "bf16x2" if values.dtype == torch.bfloat16 else "f16x2"
    # a contains the codes of bytes 0 and 1, b those of bytes 2 and 3
    for number, half in enumerate("ab"):
        for byte in range(2):
            found = f"{half}{byte}"
            names += [found, f"{found}_first", f"{found}_last"]
            lines += [
                f"prmt.b32 {found}_first, first{byte}, {word(byte, 4)}, codes_{half};",
                f"prmt.b32 {found}_last, last{byte}, {word(byte, 12)}, codes_{half};",
                f"prmt.b32 {found}, {found}_first, {found}_last, halves_{half};",
            ]
        # the low half word, the value of the first code, is last in a selector
        selectors = ("0x4051", "0x6273") if is_high_first else ("0x5140", "0x7362")
        for result, selector in zip((2 * number, 2 * number + 1), selectors):
            lines.append(f"prmt.b32 pair, {half}0, {half}1, {selector};")
            if is_scaled:
                lines.append(f"fma.rn.{packed_type} rest, pair, ${9 + result}, minus_zero;")
                lines.append(f"fma.rn.{packed_type} ${result}, pair, ${5 + result}, rest;")
            else:
                lines.append(f"mov.b32 ${result}, pair;")
    return "{ .reg .b32 " + ", ".join(names) + "; " + " ".join(lines) + " }"


def _shuffle_assembly(values: torch.Tensor, is_high_first: bool) -> str:
    """PTX that looks up 8 codes in a table of 16 fp32 values distributed over the lanes of a warp.

    Lanes i and i + 16 contain value i: four selects by the bits of the lane id, which the compiler hoists since they
    are the same for all bytes. `shfl.sync.idx` then reads the value of each code from another lane. It uses the lowest
    five bits of its index, of which the fifth is arbitrary here, so the packed codes only need to be shifted.
    """
    level = [f"0x{pattern & 0xFFFFFFFF:08x}" for pattern in values.view(torch.int32).tolist()]
    lines, names = ["mov.u32 lane, %laneid;"], ["lane", "shifted"]
    for bit in range(4):
        lines += [f"and.b32 shifted, lane, {1 << bit};", f"setp.ne.u32 bit{bit}, shifted, 0;"]
        for place in range(len(level) // 2):
            name = f"t{bit}_{place}"
            names.append(name)
            lines.append(f"selp.b32 {name}, {level[2 * place + 1]}, {level[2 * place]}, bit{bit};")
            level[place] = name
        del level[len(level) // 2 :]
    for byte in range(4):
        # results are the first codes of the four bytes, then the second codes; operand 8 contains the codes
        high, low = 8 * byte + 4, 8 * byte
        for result, shift in zip((byte, 4 + byte), (high, low) if is_high_first else (low, high)):
            lines.append(f"shr.u32 shifted, $8, {shift};")
            lines.append(f"shfl.sync.idx.b32 ${result}, {level[0]}, shifted, 0x1f, 0xffffffff;")
    return "{ .reg .pred bit0, bit1, bit2, bit3; .reg .b32 " + ", ".join(names) + "; " + " ".join(lines) + " }"
