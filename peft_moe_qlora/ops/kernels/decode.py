"""4-bit codes to numbers: inside another kernel's tile, or a whole run of experts into a 16-bit workspace."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...quantization import dynamic_map
from ...quantization.four_bit import NESTED_BLOCKSIZE
from ..operands import PackedWeight
from .code_tables import code_table, runs_ptx
from .launch import cdiv, launch, next_power_of_2
from .launch_recorder import allocate

_NESTED_BLOCKSIZE = tl.constexpr(NESTED_BLOCKSIZE)


@triton.jit
def _select(nibbles, VALUES: tl.constexpr, DTYPE: tl.constexpr):
    out = tl.full(nibbles.shape, VALUES[0], DTYPE)
    for code in tl.static_range(1, 16):
        out = tl.where(nibbles == code, tl.full(nibbles.shape, VALUES[code], DTYPE), out)
    return out


@triton.jit
def _split_pairs(pairs, DTYPE: tl.constexpr):
    """The lower and upper 16 bits; put side by side again, which costs nothing, they are the register as it was."""
    return pairs.to(tl.int16).to(DTYPE, bitcast=True), (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _as_pairs(x):
    """16-bit numbers twice in 32 bits."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


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
        pairs = tl.inline_asm_elementwise(ASSEMBLY[0], "=r,=r,=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=4)
        high, low = _split_pairs(pairs, DTYPE)
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
        pairs = tl.inline_asm_elementwise(
            ASSEMBLY[1],
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [codes, _as_pairs(coarse), _as_pairs(fine)],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
        high, low = _split_pairs(pairs, DTYPE)
    return high, low


@triton.jit
def as_scale(bits):
    """The fp32 numbers whose bits are stored as int32; fp32 as it is."""
    return bits.to(tl.float32, bitcast=True)


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
    if not IS_NESTED:
        scale = as_scale(scale)
    else:
        NUM_NESTED: tl.constexpr = (NUM_BLOCKS + _NESTED_BLOCKSIZE - 1) // _NESTED_BLOCKSIZE
        place = NESTED + expert * NUM_NESTED + block // _NESTED_BLOCKSIZE
        nested = as_scale(tl.load(place, mask=mask, other=0))
        scale = tl.load(MAP + scale.to(tl.int32)) * nested + as_scale(tl.load(OFFSET + expert))
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
