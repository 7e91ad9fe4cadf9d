"""4-bit codes to numbers: inside another kernel's tile, or a whole run of experts into a 16-bit workspace."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bitsandbytes import functional as bnb

from ...quantization.four_bit import NESTED_BLOCKSIZE
from ..operands import PackedWeight
from .launch import cdiv, launch, next_power_of_2
from .tape import allocate

_NESTED_BLOCKSIZE = tl.constexpr(NESTED_BLOCKSIZE)


class CodeTable(NamedTuple):
    """How a kernel maps codes to numbers of one dtype.

    Args:
        values: the 16 values, for the portable way: a chain of selects.
        assembly: PTX that maps four bytes to eight numbers, and PTX that also multiplies them by two scales, which
            there is for 16 bits only. "" for the portable way.
        scale: what the values were multiplied by; the scales of the blocks have to be divided by it.
    """

    values: tuple[float, ...]
    assembly: tuple[str, str]
    scale: float


_SCALES = {("nf4", torch.bfloat16): 1.43672, ("fp4", torch.bfloat16): 1.03125}
"""Factors in [1, 2) by which a table rounds with the least error, weighted by how often Gaussian weights use each
code: for NF4 in bfloat16 0.08 % instead of 0.14 %, for FP4 nothing instead of 0.13 %."""


@cache
def code_table(quant_type: str, dtype: torch.dtype, on_nvidia: bool) -> CodeTable:
    """The table of a format in a dtype; PTX where the device runs it."""
    scale = _SCALES.get((quant_type, dtype), 1.0)
    values = (bnb.get_4bit_type(quant_type, device="cpu").double() * scale).to(dtype)
    look_up = look_up_and_scale = ""
    if on_nvidia:
        as_int = torch.int32 if dtype == torch.float32 else torch.int16
        patterns = [pattern & (1 << 8 * dtype.itemsize) - 1 for pattern in values.view(as_int).tolist()]
        look_up = _permute_assembly(patterns, dtype.itemsize)
        if dtype.itemsize == 2:
            packed_type = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
            look_up_and_scale = _permute_assembly(patterns, dtype.itemsize, packed_type)
    return CodeTable(tuple(values.tolist()), (look_up, look_up_and_scale), scale)


def _permute_assembly(patterns: list[int], itemsize: int, packed_type: str = "") -> str:
    """PTX that looks up 8 codes in a table of 16 patterns of 2 or 4 bytes without touching memory.

    With a `packed_type` the numbers, of two bytes, are multiplied by `high + low`, two scales of the same type that
    come as further operands, with one rounding: `fma(number, high, number * low)`.

    `prmt.b32 d, a, b, s` picks each byte of d among the eight bytes of a and b by a nibble of s, its top bit clear.
    The packed codes, masked to three bits each, are such selectors: one permute looks four codes up in the table's
    first eight entries, one in its last eight, and a third picks between the two by each code's top bit. That is
    done for each byte of the patterns; the last permutes put the bytes together.

    An instruction holds one constant; of a second that is the same for all threads ptxas makes a move before each
    permute. `zero`, which it takes for something of the thread's own, keeps those in registers.
    """
    planes = [[pattern >> 8 * byte & 0xFF for pattern in patterns] for byte in range(itemsize)]

    def word(plane: list[int], first: int) -> str:
        return "0x" + "".join(f"{byte:02x}" for byte in reversed(plane[first : first + 4]))

    names = ["ca", "cb", "ha", "hb", "zero", "other_lanes"]
    lines = ["mov.u32 zero, %lanemask_lt;", "mov.u32 other_lanes, %lanemask_ge;", "and.b32 zero, zero, other_lanes;"]
    for index, plane in enumerate(planes):
        for part, first in (("l", 0), ("h", 8)):
            names.append(f"w{index}{part}")
            lines.append(f"or.b32 w{index}{part}, zero, {word(plane, first)};")
    # the codes of bytes 0 and 1 are a's, those of bytes 2 and 3 b's
    for half in "ab":
        for index, plane in enumerate(planes):
            found = f"{half}{index}"
            names += [found, f"{found}l", f"{found}h"]
            lines += [
                f"prmt.b32 {found}l, w{index}l, {word(plane, 4)}, c{half};",
                f"prmt.b32 {found}h, w{index}h, {word(plane, 12)}, c{half};",
                f"prmt.b32 {found}, {found}l, {found}h, h{half};",
            ]
    # of each byte the high nibble comes first: found are codes 1, 0, 3, 2
    if itemsize == 2:
        names += ["n", "p", "minus_zero"]
        # leaves every product as it is
        lines.append("mov.b32 minus_zero, 0x80008000;")
        for place, (half, selector) in enumerate((("a", "0x7351"), ("b", "0x7351"), ("a", "0x6240"), ("b", "0x6240"))):
            if not packed_type:
                lines.append(f"prmt.b32 ${place}, {half}0, {half}1, {selector};")
                continue
            # the operands that follow the codes: two registers of scales for the four bytes, then two of what they lack
            lines += [
                f"prmt.b32 n, {half}0, {half}1, {selector};",
                f"fma.rn.{packed_type} p, n, ${7 if half == 'a' else 8}, minus_zero;",
                f"fma.rn.{packed_type} ${place}, n, ${5 if half == 'a' else 6}, p;",
            ]
    else:
        for number, half in enumerate("ab"):
            for pair, selector in ((0, "0x5140"), (1, "0x7362")):
                low, high = f"{half}{pair}low", f"{half}{pair}high"
                names += [low, high]
                lines += [
                    f"prmt.b32 {low}, {half}0, {half}1, {selector};",
                    f"prmt.b32 {high}, {half}2, {half}3, {selector};",
                    f"prmt.b32 ${4 + 2 * number + pair}, {low}, {high}, 0x5410;",
                    f"prmt.b32 ${2 * number + pair}, {low}, {high}, 0x7632;",
                ]
    codes = "$4" if itemsize == 2 else "$8"
    start = [
        f".reg .b32 {', '.join(names)};",
        f"and.b32 ca, {codes}, 0x77777777;",
        # which half of the table, by the codes' top bits: selector i or i + 4
        f"shr.u32 ha, {codes}, 1;",
        "and.b32 ha, ha, 0x44444444;",
        "or.b32 ha, ha, 0x32103210;",
        "shr.u32 cb, ca, 16;",
        "shr.u32 hb, ha, 16;",
    ]
    return "{ " + " ".join([*start, *lines]) + " }"


@triton.jit
def _select(nibbles, VALUES: tl.constexpr, DTYPE: tl.constexpr):
    out = tl.full(nibbles.shape, VALUES[0], DTYPE)
    for code in tl.static_range(1, 16):
        out = tl.where(nibbles == code, tl.full(nibbles.shape, VALUES[code], DTYPE), out)
    return out


@triton.jit
def look_up_codes(codes, VALUES: tl.constexpr, ASSEMBLY: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes to the table's values for their high and for their low nibbles."""
    if ASSEMBLY[0] == "":
        high = _select((codes >> 4).to(tl.int32), VALUES, DTYPE)
        low = _select((codes & 15).to(tl.int32), VALUES, DTYPE)
    elif tl.float32 == DTYPE:
        high, low = tl.inline_asm_elementwise(
            ASSEMBLY[0],
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        high, low = tl.inline_asm_elementwise(
            ASSEMBLY[0],
            "=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
        high = high.to(DTYPE, bitcast=True)
        low = low.to(DTYPE, bitcast=True)
    return high, low


@triton.jit
def decode_codes(codes, scale, VALUES: tl.constexpr, ASSEMBLY: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes to the weights of their high and of their low nibbles, rounded once.

    `scale`, in fp32, has the shape of the codes or broadcasts to it; it is that of the blocks over the table's.
    """
    if ASSEMBLY[1] == "":
        high, low = look_up_codes(codes, VALUES, ASSEMBLY, DTYPE)
        high = (high.to(tl.float32) * scale).to(DTYPE)
        low = (low.to(tl.float32) * scale).to(DTYPE)
    else:
        coarse = scale.to(DTYPE)
        fine = (scale - coarse.to(tl.float32)).to(DTYPE)
        high, low = tl.inline_asm_elementwise(
            ASSEMBLY[1],
            "=r,=r,=r,=r,r,r,r,r,r",
            [codes, coarse, fine],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
        high = high.to(DTYPE, bitcast=True)
        low = low.to(DTYPE, bitcast=True)
    return high, low


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
    """fp32 scales of blocks of one expert; where masked, some finite value."""
    place = ABSMAX + expert.to(tl.int64) * NUM_BLOCKS + block
    scale = tl.load(place, mask=mask, other=0)
    if IS_NESTED:
        NUM_NESTED: tl.constexpr = (NUM_BLOCKS + _NESTED_BLOCKSIZE - 1) // _NESTED_BLOCKSIZE
        place = NESTED + expert * NUM_NESTED + block // _NESTED_BLOCKSIZE
        nested = tl.load(place, mask=mask, other=0.0)
        scale = tl.load(MAP + scale.to(tl.int32)) * nested + tl.load(OFFSET + expert)
    return scale


@triton.jit(do_not_specialize=["first_expert"])
def _decode_kernel(
    CODES,
    ABSMAX,
    NESTED,
    OFFSET,
    MAP,
    OUT,
    first_expert,
    NUMEL: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    VALUES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    NUM_BYTES: tl.constexpr = (NUMEL + 1) // 2
    NUM_BLOCKS: tl.constexpr = (NUMEL + BLOCKSIZE - 1) // BLOCKSIZE
    BLOCK_BYTES: tl.constexpr = BLOCKSIZE // 2
    expert = first_expert + tl.program_id(1)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    codes = tl.load(CODES + expert.to(tl.int64) * NUM_BYTES + byte, mask=byte < NUM_BYTES, other=0)
    scale = load_scales(ABSMAX, NESTED, OFFSET, MAP, expert, block, block < NUM_BLOCKS, NUM_BLOCKS, IS_NESTED)
    high, low = decode_codes(codes, scale[:, None], VALUES, ASSEMBLY, tl.float32)
    weights = tl.interleave(high, low).to(OUT.dtype.element_ty)
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(OUT + tl.program_id(1).to(tl.int64) * NUMEL + place, weights, mask=place < NUMEL)


DECODE_BYTES = 4096


def kernel_tensors(weight: PackedWeight) -> tuple[torch.Tensor, ...]:
    """Codes, absmax, nested absmax, offset and dynamic map of a packed weight; the codes stand for what is absent."""
    first = weight.tensors[0]
    if weight.is_nested:
        return (*weight.tensors, dynamic_map(first.device))
    return (*weight.tensors, *[first] * (5 - len(weight.tensors)))


def frozen_tensors(*weights: PackedWeight) -> tuple[torch.Tensor, ...]:
    """Every tensor that kernels read of these weights."""
    tensors = tuple(tensor for weight in weights for tensor in weight.tensors)
    if any(weight.is_nested for weight in weights):
        tensors += (dynamic_map(tensors[0].device),)
    return tensors


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 values of 8-bit scales, as in `bitsandbytes.functional.create_dynamic_map`."""
    return bnb.create_dynamic_map().to(device)


@triton.jit
def _plain_scales_kernel(ABSMAX, NESTED, OFFSET, MAP, OUT, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(1)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = load_scales(ABSMAX, NESTED, OFFSET, MAP, expert, block, block < NUM_BLOCKS, NUM_BLOCKS, True)
    tl.store(OUT + expert.to(tl.int64) * NUM_BLOCKS + block, scale, mask=block < NUM_BLOCKS)


def with_plain_scales(weight: PackedWeight) -> PackedWeight:
    """The same weight with fp32 scales, which a product can load ahead of time; nested ones take two steps."""
    if not weight.is_nested:
        return weight
    codes, absmax = weight.tensors[:2]
    plain = allocate(absmax.shape, torch.float32, absmax.device)
    num_blocks = absmax.shape[1]
    launch(
        _plain_scales_kernel,
        (cdiv(num_blocks, 1024), weight.num_experts),
        (*kernel_tensors(weight)[1:], plain),
        (),
        enable_fp_fusion=False,
        NUM_BLOCKS=num_blocks,
        BLOCK=1024,
    )
    return weight._replace(tensors=(codes, plain))


def decode(
    weight: PackedWeight, first_expert: int, num_experts: int, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`(num_experts, rows, columns)` weights, bit for bit those of `QuantizedStack.decode`; into `out` if given."""
    device = weight.tensors[0].device
    if out is None:
        out = allocate((num_experts, weight.rows, weight.columns), dtype, device)
    numel = weight.rows * weight.columns
    table = code_table(weight.quant_type, torch.float32, runs_ptx(device))
    num_blocks = cdiv(numel, weight.blocksize)
    blocks = min(next_power_of_2(num_blocks), max(1, 2 * DECODE_BYTES // weight.blocksize))
    launch(
        _decode_kernel,
        (cdiv(num_blocks, blocks), num_experts),
        (*kernel_tensors(weight), out),
        (first_expert,),
        NUMEL=numel,
        BLOCKSIZE=weight.blocksize,
        IS_NESTED=weight.is_nested,
        VALUES=table.values,
        ASSEMBLY=table.assembly,
        BLOCKS=blocks,
        enable_fp_fusion=False,
    )
    return out


def runs_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None
