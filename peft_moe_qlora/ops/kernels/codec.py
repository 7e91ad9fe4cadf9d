"""The storage of weights as one constexpr argument of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..operands import PackedWeight


@dataclass(frozen=True, repr=False)
class Codec:
    """Decoding of a tile of bytes to weights.

    Args:
        name: name of the codes and of the dtype that they are decoded to; codecs with the same name differ only in
            their grid.
        look_up: Triton function `(codes, CODEC, DTYPE)` -> values of the first and of the second code of each pair, in
            DTYPE. A pair is a byte or a 16-bit integer.
        decode: `(codes, scale, CODEC, DTYPE)` -> the same times an fp32 scale that broadcasts, rounded once.
        is_packed: whether there are codes; 16-bit weights are read without decoding.
        first_shift: position of the first of two codes in a byte.
        block: rows and columns that share a scale; the columns are a power of two.
        part_rows: rows of a part; each part has separate blocks.
        scale: type of the scales, fp32 or a type given by its bits.
        second_level: decoding of two-level scales, as in `Format`.
        values: values of the 16 codes, for the portable path, a chain of selects.
        assembly: PTX of `look_up`; "" for the portable path.
        scaled_assembly: PTX of `decode`.
        crossed_assembly: the same for two pairs at a time, of two bytes each: first the two first codes, then the two
            second codes.
        unit: factor by which the values were multiplied; scales must be divided by it.
        power: factor by which `decode` must multiply scales.
    """

    name: str = "16 bits"
    look_up: Any = None
    decode: Any = None
    is_packed: bool = True
    first_shift: int = 0
    block: tuple[int, int] = (1, 1)
    part_rows: int = 0
    scale: str = "fp32"
    second_level: str = ""
    values: tuple[float, ...] = ()
    assembly: str = ""
    scaled_assembly: str = ""
    crossed_assembly: str = ""
    unit: float = 1.0
    power: float = 1.0

    @property
    def block_rows(self) -> int:
        return self.block[0]

    @property
    def block_columns(self) -> int:
        return self.block[1]

    @property
    def has_byte_pairs(self) -> bool:
        """Whether a byte has two codes; only codes of 4 bits have a table of values."""
        return bool(self.values)

    @property
    def pair_bytes(self) -> int:
        """Bytes of two codes."""
        return 1 if self.has_byte_pairs else 2

    def __repr__(self) -> str:
        # part of the names of compiled functions
        scale = f"{self.scale}{self.second_level}"
        return f"{self.name}_{self.block[0]}x{self.block[1]}_{self.part_rows}_{scale}".replace(" ", "_")

    @property
    def cache_key(self) -> str:
        """Part of the key of compiled kernels in Triton's on-disk cache."""
        functions = [getattr(one, "cache_key", "") for one in (self.look_up, self.decode)]
        numbers = (self.values, self.unit, self.power, self.first_shift)
        return "-".join(
            [repr(self), *functions, str(numbers), self.assembly, self.scaled_assembly, self.crossed_assembly]
        )


DENSE = Codec(is_packed=False)


class Decoder(NamedTuple):
    """Decoding of codes, independent of the grid; fields as in `Codec`."""

    look_up: Any
    decode: Any
    first_shift: int = 0
    values: tuple[float, ...] = ()
    assembly: str = ""
    scaled_assembly: str = ""
    crossed_assembly: str = ""
    unit: float = 1.0
    power: float = 1.0


_DECODERS: dict[str, Callable[[str, torch.dtype, bool], Decoder]] = {}


def register_decoder(
    *names: str,
) -> Callable[[Callable[[str, torch.dtype, bool], Decoder]], Callable[[str, torch.dtype, bool], Decoder]]:
    """Decorator that registers a decoder for formats with these `kernel_codes`.

    The function is called with the name, the dtype of the weights, and whether the device runs PTX.
    """

    def register(make: Callable[[str, torch.dtype, bool], Decoder]) -> Callable[[str, torch.dtype, bool], Decoder]:
        _DECODERS.update(dict.fromkeys(names, make))
        return make

    return register


def codec_of(weight: PackedWeight, dtype: torch.dtype) -> Codec:
    """The codec that decodes a weight to a dtype."""
    if not weight.is_packed:
        return DENSE
    return codec_for(
        weight.storage, weight.rows, weight.columns, weight.parts, weight.is_nested, dtype, _runs_ptx(weight)
    )


@cache
def codec_for(
    storage: Any, rows: int, columns: int, parts: int, is_nested: bool, dtype: torch.dtype, on_nvidia: bool
) -> Codec:
    decoder = decoder_of(storage.kernel_codes, dtype, on_nvidia)
    block = storage.tile_block(rows, columns, parts) or (1, columns)
    return Codec(
        name=f"{storage.kernel_codes} {dtype} {'ptx' if decoder.assembly else 'portable'}".replace("torch.", ""),
        block=block,
        part_rows=rows // parts,
        # the product of both levels is fp32
        scale="fp32" if is_nested else storage.scale_kind,
        second_level=storage.second_level if is_nested else "",
        **decoder._asdict(),
    )


@cache
def decoder_of(codes: str, dtype: torch.dtype, on_nvidia: bool) -> Decoder:
    """The decoder for a dtype, with PTX on NVIDIA GPUs."""
    if codes not in _DECODERS:
        raise ValueError(
            f"No decoder is registered for kernel_codes={codes!r}. Expected one of {', '.join(_DECODERS)}."
        )
    return _DECODERS[codes](codes, dtype, on_nvidia)


def _runs_ptx(weight: PackedWeight) -> bool:
    return runs_ptx(weight.tensors[0].device)


def runs_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


@triton.jit
def split_pairs(pairs, DTYPE: tl.constexpr):
    """The lower and upper 16 bits; joining them again costs nothing and gives the original register."""
    return pairs.to(tl.int16).to(DTYPE, bitcast=True), (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def as_pairs(x):
    """Duplicates 16-bit numbers into both halves of 32 bits."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def decode_bytes(codes, scale, CODEC: tl.constexpr, DTYPE: tl.constexpr):
    """Values of pairs of one-byte codes times `scale` (fp32, broadcasts), rounded once."""
    ASSEMBLY: tl.constexpr = CODEC.scaled_assembly
    if ASSEMBLY == "":
        first, second = CODEC.look_up(codes, CODEC, DTYPE)
        first = (first.to(tl.float32) * scale).to(DTYPE)
        second = (second.to(tl.float32) * scale).to(DTYPE)
    else:
        scale = scale * CODEC.power
        coarse = scale.to(DTYPE)
        fine = (scale - coarse.to(tl.float32)).to(DTYPE)
        pairs = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=r,=r,r,r,r,r,r",
            [codes, as_pairs(coarse), as_pairs(fine)],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        first, second = split_pairs(pairs, DTYPE)
    return first, second
