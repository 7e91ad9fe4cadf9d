"""Decodes FP8 (e4m3) codes.

As bf16, the bits `sign << 15 | rest << 4` are the value times 2^-120, for subnormal codes too; as fp16, `sign << 15 |
rest << 7` are the value times 2^-8. The multiplication by the scale corrects this. On compute capability 9.0 the
hardware conversion uses a slow pipe for bf16; before 8.9 there is none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .codec import Decoder, decode_bytes, register_decoder, split_pairs


@triton.jit
def e4m3_value(code, DTYPE: tl.constexpr):
    """Portable decoding by exponent and mantissa; uses only normal numbers, which no device flushes to zero."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    significand = tl.where(exponent > 0, mantissa + 8, mantissa).to(tl.float32)
    # 2^(exponent - 10); subnormal codes use the exponent of the smallest normal codes
    power = ((tl.maximum(exponent, 1) + 117) << 23).to(tl.float32, bitcast=True)
    value = significand * power
    return tl.where(code >= 128, -value, value).to(DTYPE)


@triton.jit
def look_up_e4m3(codes, CODEC: tl.constexpr, DTYPE: tl.constexpr):
    """Values of the first and of the second code of each pair, exact in 16 bits."""
    ASSEMBLY: tl.constexpr = CODEC.assembly
    if ASSEMBLY == "":
        first = e4m3_value(codes.to(tl.int32) & 255, DTYPE)
        second = e4m3_value((codes.to(tl.int32) >> 8) & 255, DTYPE)
    elif tl.float32 == DTYPE:
        first, second = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [codes], dtype=(tl.float32, tl.float32), is_pure=True, pack=2
        )
    else:
        pairs = tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=2)
        first, second = split_pairs(pairs, DTYPE)
    return first, second


@register_decoder("e4m3")
def _decoder(codes: str, dtype: torch.dtype, on_nvidia: bool) -> Decoder:
    assembly = scaled = crossed = ""
    if on_nvidia and dtype == torch.float32:
        assembly = _assembly_of_fp32()
    elif on_nvidia:
        assembly, scaled = (_assembly_of_pairs(dtype, is_scaled) for is_scaled in (False, True))
        crossed = _assembly_of_pairs(dtype, True, is_crossed=True)
    return Decoder(
        look_up_e4m3,
        decode_bytes,
        assembly=assembly,
        scaled_assembly=scaled,
        crossed_assembly=crossed,
        power=_POWERS[dtype],
    )


_POWERS = {torch.float32: 1.0, torch.bfloat16: 2.0**120, torch.float16: 2.0**8}
"""Factors by which the bits must be multiplied. Scales include them, so scales must be below 2^7 (`SCALE_LIMIT`)."""


def _assembly_of_pairs(dtype: torch.dtype, is_scaled: bool, is_crossed: bool = False) -> str:
    """PTX that converts four codes (operand 2) to two pairs of 16-bit numbers (results 0 and 1).

    If crossed, result 0 is of codes 0 and 2, result 1 of codes 1 and 3. If scaled, each is multiplied by `coarse +
    fine` with one rounding, as `fma(bits, coarse, bits * fine)`; operands 3 and 4 are pairs of the coarse scale, 5 and
    6 of the fine scale, both multiplied by the power of two in `_POWERS`.
    """
    packed_type, shift, mask, power = (
        ("bf16x2", 4, "0x07f007f0", "0x7b807b80")
        if dtype == torch.bfloat16
        else ("f16x2", 1, "0x3f803f80", "0x5c005c00")
    )
    lines = ["mov.b32 minus_zero, 0x80008000;", f"mov.b32 power, {power};"]
    # each code as the high byte of a half word
    selectors = ("0x2404", "0x3414") if is_crossed else ("0x1404", "0x3424")
    for pair, selector in enumerate(selectors):
        lines += [
            f"prmt.b32 placed, $2, 0, {selector};",
            f"shr.u32 rest, placed, {shift};",
            "and.b32 placed, placed, 0x80008000;",
            # (rest & mask) | placed
            f"lop3.b32 placed, rest, {mask}, placed, 0xea;",
        ]
        if is_scaled:
            lines.append(f"fma.rn.{packed_type} rest, placed, ${5 + pair}, minus_zero;")
            lines.append(f"fma.rn.{packed_type} ${pair}, placed, ${3 + pair}, rest;")
        else:
            lines.append(f"fma.rn.{packed_type} ${pair}, placed, power, minus_zero;")
    return "{ .reg .b32 placed, rest, power, minus_zero; " + " ".join(lines) + " }"


def _assembly_of_fp32() -> str:
    """PTX that converts four codes (operand 4) to four fp32 numbers: results 0 and 1 are the first of each pair."""
    lines = []
    for byte in range(4):
        lines += [
            f"prmt.b32 placed, $4, 0, 0x{byte}444;",
            "shr.u32 rest, placed, 4;",
            "and.b32 placed, placed, 0x80000000;",
            "lop3.b32 placed, rest, 0x07f00000, placed, 0xea;",
            "mov.b32 value, placed;",
            # 2^120
            "mul.rn.f32 value, value, 0f7b800000;",
            f"mov.b32 ${byte // 2 + 2 * (byte % 2)}, value;",
        ]
    return "{ .reg .b32 placed, rest; .reg .f32 value; " + " ".join(lines) + " }"
