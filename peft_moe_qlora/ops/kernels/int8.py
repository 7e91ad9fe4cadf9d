"""Decodes int8 codes, with exact values in 16 bits.

The PTX places a code in the mantissa of a number whose last mantissa bit has the value 1, and subtracts the offset.
The mantissa of bf16 has 7 bits, one too few, so the upper bit becomes a separate number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .codec import Decoder, decode_bytes, register_decoder, split_pairs


@triton.jit
def look_up_int8(codes, CODEC: tl.constexpr, DTYPE: tl.constexpr):
    """Values of the first and of the second code of each pair."""
    ASSEMBLY: tl.constexpr = CODEC.assembly
    if ASSEMBLY == "":
        # right shifts preserve the sign
        first = ((codes.to(tl.int32) << 24) >> 24).to(tl.float32).to(DTYPE)
        second = (codes.to(tl.int32) >> 8).to(tl.float32).to(DTYPE)
    elif tl.float32 == DTYPE:
        first, second = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [codes], dtype=(tl.float32, tl.float32), is_pure=True, pack=2
        )
    else:
        pairs = tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=2)
        first, second = split_pairs(pairs, DTYPE)
    return first, second


@register_decoder("int8")
def _decoder(codes: str, dtype: torch.dtype, on_nvidia: bool) -> Decoder:
    assembly = scaled = crossed = ""
    if on_nvidia and dtype == torch.float32:
        assembly = _assembly_of_fp32()
    elif on_nvidia:
        assembly, scaled = (_assembly_of_pairs(dtype, is_scaled) for is_scaled in (False, True))
        crossed = _assembly_of_pairs(dtype, True, is_crossed=True)
    # small scales are subnormal in fp16, so values are divided by 256 and scales multiplied by it
    power = 2.0**8 if dtype == torch.float16 else 1.0
    return Decoder(
        look_up_int8,
        decode_bytes,
        assembly=assembly,
        scaled_assembly=scaled,
        crossed_assembly=crossed,
        power=power,
    )


def _assembly_of_pairs(dtype: torch.dtype, is_scaled: bool, is_crossed: bool = False) -> str:
    """PTX that converts four codes (operand 2) to two pairs of 16-bit numbers (results 0 and 1).

    If crossed, result 0 is of codes 0 and 2, result 1 of codes 1 and 3. If scaled, each is multiplied by `coarse +
    fine` with one rounding, as `fma(value, coarse, value * fine)`; operands 3 and 4 are pairs of the coarse scale, 5
    and 6 of the fine scale.
    """
    if dtype == torch.bfloat16:
        # 128 + lower bits, minus 128, or minus 256 for a negative code: the upper bit is the lowest bit of an exponent
        packed_type, codes, magic, names = "bf16x2", "$2", "0x43434343", "placed, over, minus_one"
        lines = ["mov.b32 minus_one, 0xbf80bf80;"]
        value = [
            "and.b32 over, placed, 0xff80ff80;",
            "and.b32 placed, placed, 0xff7fff7f;",
            "fma.rn.bf16x2 placed, over, minus_one, placed;",
        ]
    else:
        # 1024 + 128 + code; if scaled, divided by 256
        packed_type, codes, names = "f16x2", "shifted", "placed, shifted, too_much"
        magic, too_much = ("0x44444444", "0x44804480") if is_scaled else ("0x64646464", "0x64806480")
        lines = ["xor.b32 shifted, $2, 0x80808080;", f"mov.b32 too_much, {too_much};"]
        value = ["sub.rn.f16x2 placed, placed, too_much;"]
    selectors = ("0x4240", "0x4341") if is_crossed else ("0x4140", "0x4342")
    for pair, selector in enumerate(selectors):
        lines += [f"prmt.b32 placed, {codes}, {magic}, {selector};", *value]
        if is_scaled:
            lines.append(f"fma.rn.{packed_type} rest, placed, ${5 + pair}, minus_zero;")
            lines.append(f"fma.rn.{packed_type} ${pair}, placed, ${3 + pair}, rest;")
        else:
            lines.append(f"mov.b32 ${pair}, placed;")
    return f"{{ .reg .b32 {names}, rest, minus_zero; mov.b32 minus_zero, 0x80008000; " + " ".join(lines) + " }"


def _assembly_of_fp32() -> str:
    """PTX that converts four codes (operand 4) to four fp32 numbers: results 0 and 1 are the first of each pair."""
    lines = ["xor.b32 shifted, $4, 0x80808080;"]
    for byte in range(4):
        lines += [
            # 2^23 + 128 + code
            f"prmt.b32 placed, shifted, 0x4b000000, 0x754{byte};",
            "mov.b32 value, placed;",
            "sub.rn.f32 value, value, 0f4b000080;",
            f"mov.b32 ${byte // 2 + 2 * (byte % 2)}, value;",
        ]
    return "{ .reg .b32 placed, shifted; .reg .f32 value; " + " ".join(lines) + " }"
