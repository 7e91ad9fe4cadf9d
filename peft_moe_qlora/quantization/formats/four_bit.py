"""The 4-bit formats of bitsandbytes, for one matrix at a time.

A matrix is flattened row by row and divided into blocks; each block stores its largest magnitude (`absmax`, fp32) and
one 4-bit code per value, two codes per byte, the first in the high half. The formats `nf4` and `fp4` differ only in
the table that maps a code to a value in [-1, 1]. NF4 is the data type of QLoRA (Dettmers et al. 2023,
arXiv:2305.14314, section 3). Codes and scales are identical to those of `bitsandbytes.functional.quantize_4bit`
(0.50).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from bitsandbytes import functional as bnb
from torch.nn.functional import pad

from ..format import Format, Spec, Tensors, parse_format, register_format

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # fixed in bitsandbytes: number of scales that share a second-level scale
QUANTIZABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


_LARGEST_CALL = 2**30
# relative to a block's largest magnitude; a smaller scale clips the largest weight, but is finer for the others
_SCALE_FACTORS = (1.0, 0.95, 0.9, 0.85)


@register_format
@dataclass(frozen=True)
class FourBitFormat(Format):
    """NF4 and FP4 of bitsandbytes: `"nf4/64"`, `"fp4/128"`, and with 8-bit scales `"nf4/64+dq"`.

    Args:
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: number of values that share a scale, one of `BLOCKSIZES`.
        double_quant: store the scales in 8 bits (QLoRA section 3, "double quantization"): 0.13 instead of 0.5 bits per
            weight at block size 64.

    Raises:
        ValueError: bitsandbytes does not support `quant_type` or `blocksize`, or `double_quant` is not a bool.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = False

    example: ClassVar[str] = "nf4/64"

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type={self.quant_type!r} is unknown. Choose one of {QUANT_TYPES}.")
        if type(self.blocksize) is not int or self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize={self.blocksize!r} is not supported. Choose one of {BLOCKSIZES}.")
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant={self.double_quant!r:.200}: expected True or False.")

    def __str__(self) -> str:
        return f"{self.quant_type}/{self.blocksize}" + ("+dq" if self.double_quant else "")

    @property
    def kernel_codes(self) -> str:
        return self.quant_type

    @property
    def flat_blocksize(self) -> int:
        return self.blocksize

    @property
    def second_level(self) -> str:
        return "map" if self.double_quant else ""

    @classmethod
    def from_text(cls, text: str) -> FourBitFormat | None:
        match = re.fullmatch(rf"({'|'.join(QUANT_TYPES)})/([0-9]+)(\+dq)?", text)
        return None if match is None else cls(match[1], int(match[2]), match[3] is not None)

    def tensors(self, rows: int, columns: int, parts: int = 1) -> dict[str, Spec]:
        num_blocks = -(-rows * columns // self.blocksize)
        codes = Spec((-(-rows * columns // 2),), torch.uint8)
        if not self.double_quant:
            return {"codes": codes, "block_absmax": Spec((num_blocks,), torch.int32)}
        return {
            "codes": codes,
            "block_absmax": Spec((num_blocks,), torch.uint8),
            "group_absmax": Spec((-(-num_blocks // NESTED_BLOCKSIZE),), torch.int32),
            "offset": Spec((), torch.int32),
        }

    def quantize(self, matrix: torch.Tensor, parts: int = 1) -> dict[str, torch.Tensor]:
        codes, absmax = quantize(matrix, self)
        return {"codes": codes, **self.store_scales(absmax, *matrix.shape)}

    def dequantize(
        self, tensors: Tensors, rows: int, columns: int, dtype: torch.dtype, parts: int = 1
    ) -> torch.Tensor:
        codes, absmax = tensors["codes"], self.scales(tensors)
        values = dequantize(codes.flatten(), absmax.flatten(), len(codes) * rows * columns, self, dtype)
        return values.view(-1, rows, columns)

    def matrices_at_a_time(self, rows: int, columns: int) -> int:
        # bitsandbytes counts the values of a call in 32 bits, and takes them as one run of blocks
        return max(1, _LARGEST_CALL // (rows * columns)) if (rows * columns) % self.blocksize == 0 else 1

    def why_not_joined(self, rows: int, columns: int) -> str | None:
        is_whole = rows * columns % self.blocksize == 0
        return None if is_whole else f"a block of {self.blocksize} weights would span two of its parts"

    def tile_block(self, rows: int, columns: int, parts: int = 1) -> tuple[int, int] | None:
        return (1, self.blocksize) if columns % self.blocksize == 0 else None

    def blocks(self, matrix: torch.Tensor, parts: int = 1) -> torch.Tensor:
        flat = matrix.flatten()
        return pad(flat, (0, -len(flat) % self.blocksize)).view(-1, self.blocksize)

    def scales(self, tensors: Tensors) -> torch.Tensor:
        if not self.double_quant:
            return tensors["block_absmax"].view(torch.float32)
        group_absmax, offset = (tensors[name].view(torch.float32) for name in ("group_absmax", "offset"))
        return unnest(NestedAbsmax(tensors["block_absmax"], group_absmax, offset))

    def scale_of_weights(self, scales: torch.Tensor, rows: int, columns: int, parts: int = 1) -> torch.Tensor:
        return scales.repeat_interleave(self.blocksize)[: rows * columns].view(rows, columns)

    def candidates(self, largest: torch.Tensor, before: torch.Tensor) -> Iterable[torch.Tensor]:
        return (*(largest * factor for factor in _SCALE_FACTORS), before)

    def nearest(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The nearest codes. Scales may be 0, or negative: `double_quant` may round small ones to negative numbers."""
        table, order = code_values(self.quant_type, weights.device).sort()
        middles = (table[1:] + table[:-1]) / 2
        ratios = torch.where(scales == 0, 0, weights / scales).contiguous()
        return order.to(torch.uint8)[torch.bucketize(ratios, middles)]

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return code_values(self.quant_type, codes.device)[codes.int()]

    def store_codes(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = codes.flatten()
        pairs = pad(flat, (0, len(flat) % 2)).view(-1, 2)
        return {"codes": pairs[:, 0] << 4 | pairs[:, 1]}

    def store_scales(self, scales: torch.Tensor, rows: int, columns: int, parts: int = 1) -> dict[str, torch.Tensor]:
        if not self.double_quant:
            return {"block_absmax": scales.view(torch.int32)}
        nested = nest(scales)
        return {
            "block_absmax": nested.codes,
            "group_absmax": nested.absmax.view(torch.int32),
            "offset": nested.offset.view(torch.int32),
        }


def format_of(storage: str | None, quant_type: str | None, blocksize: int, double_quant: bool) -> Format | None:
    """The format that a config specifies, by name or by the options of 4-bit formats; None for 16 bits.

    Raises:
        ValueError: the name or an option is invalid, or the options contradict the name.
    """
    if storage is not None:
        found = parse_format(storage)
        asked = (quant_type, blocksize)
        if asked not in (("nf4", 64), (None, 64), spelled(found)[1:3]):
            raise ValueError(
                f"storage={storage!r} contradicts quant_type={quant_type!r}, blocksize={blocksize}. Set either "
                "storage or quant_type and blocksize."
            )
        return found
    return None if quant_type is None else FourBitFormat(quant_type, blocksize, double_quant)


def spelled(storage: Format | None) -> tuple[str | None, str | None, int, bool]:
    """The four arguments with which `format_of` returns a format."""
    if isinstance(storage, FourBitFormat):
        return None, storage.quant_type, storage.blocksize, storage.double_quant
    return None if storage is None else str(storage), None, 64, False


@dataclass(frozen=True)
class NestedAbsmax:
    """Scales stored in 8 bits; they are decoded as `table[codes] * absmax[block] + offset`.

    `codes (..., num_blocks)` uint8, `absmax (..., ceil(num_blocks / 256))` fp32, `offset (...)` fp32.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor


def quantize(matrix: torch.Tensor, storage: FourBitFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes one matrix: codes `(ceil(numel / 2),)` uint8, absmax `(ceil(numel / blocksize),)` fp32."""
    codes, state = bnb.quantize_4bit(
        matrix.contiguous(), blocksize=storage.blocksize, quant_type=storage.quant_type, compress_statistics=False
    )
    return codes.flatten(), state.absmax


def dequantize(
    codes: torch.Tensor, absmax: torch.Tensor, numel: int, storage: FourBitFormat, dtype: torch.dtype
) -> torch.Tensor:
    """Decodes the `(numel,)` values in `dtype`; products are computed in fp32 and rounded once."""
    # on a CPU, bitsandbytes compiles a kernel per shape for these, which takes seconds
    library_compiles = codes.device.type == "cpu" and (numel % 2 or storage.blocksize >= 2048)
    if library_compiles:
        return dequantize_reference(codes, absmax, numel, storage, dtype)
    state = bnb.QuantState(
        absmax=absmax,
        # for a 1-D shape the CPU operator returns a 2-D tensor, but declares a 1-D tensor to torch.compile
        shape=torch.Size((1, numel)),
        dtype=dtype,
        blocksize=storage.blocksize,
        quant_type=storage.quant_type,
        code=code_values(storage.quant_type, codes.device),
    )
    return bnb.dequantize_4bit(codes.view(-1, 1), state).view(numel)


def dequantize_reference(
    codes: torch.Tensor, absmax: torch.Tensor, numel: int, storage: FourBitFormat, dtype: torch.dtype
) -> torch.Tensor:
    """`dequantize` in plain torch."""
    table = code_values(storage.quant_type, codes.device)
    values = torch.stack((table[(codes >> 4).int()], table[(codes & 15).int()]), dim=-1).flatten()[:numel]
    num_blocks = absmax.numel()
    padded = pad(values, (0, num_blocks * storage.blocksize - numel)).view(num_blocks, storage.blocksize)
    return (padded * absmax[:, None]).flatten()[:numel].to(dtype)


def nest(absmax: torch.Tensor) -> NestedAbsmax:
    """Quantizes scales to 8 bits around their mean, as `quantize_4bit(compress_statistics=True)` does."""
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return NestedAbsmax(codes, state.absmax, offset)


def unnest(nested: NestedAbsmax) -> torch.Tensor:
    """Decodes the fp32 scales; all three tensors may have the same leading dimensions, `(E, ...)`."""
    num_blocks = nested.codes.shape[-1]
    scales = nested.absmax.repeat_interleave(NESTED_BLOCKSIZE, dim=-1)[..., :num_blocks]
    return dynamic_map(nested.codes.device)[nested.codes.int()] * scales + nested.offset[..., None]


@cache
def code_values(quant_type: str, device: torch.device) -> torch.Tensor:
    """The fp32 values of the 16 codes."""
    with _fp32_by_default():
        return bnb.get_4bit_type(quant_type, device=device)


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The fp32 values of the 256 codes of 8-bit scales."""
    with _fp32_by_default():
        return bnb.create_dynamic_map().to(device)


@contextmanager
def _fp32_by_default() -> Iterator[None]:
    # bitsandbytes creates its tables in torch's default dtype, which is 16-bit while transformers builds a model
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
