"""The 4-bit formats of bitsandbytes, for one matrix at a time.

A matrix is flattened row by row and cut into blocks; each block stores its largest magnitude (`absmax`, fp32) and one
4-bit code per value, two codes to a byte, the first in the high half. The formats `nf4` and `fp4` differ only in the
table that maps a code to a value in [-1, 1]. NF4 is the data type of QLoRA (Dettmers et al. 2023, arXiv:2305.14314,
section 3); bytes and scales here are those of `bitsandbytes.functional.quantize_4bit` (0.50).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from bitsandbytes import functional as bnb
from torch.nn.functional import pad

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # fixed in bitsandbytes: how many scales share one second-level scale
QUANTIZABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class FourBitFormat:
    """How a stack is stored in 4 bits.

    Args:
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: number of values that share a scale, one of `BLOCKSIZES`.
        double_quant: store the scales themselves in 8 bits (QLoRA section 3, "double quantization"): 0.13 instead of
            0.5 bits a weight at block size 64.

    Raises:
        ValueError: `quant_type` or `blocksize` is none that bitsandbytes knows, or `double_quant` no bool.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type={self.quant_type!r} is unknown; choose one of {QUANT_TYPES}.")
        if type(self.blocksize) is not int or self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize={self.blocksize!r} is not supported; choose one of {BLOCKSIZES}.")
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant={self.double_quant!r:.200}: True or False was expected.")

    def __str__(self) -> str:
        return f"{self.quant_type}/{self.blocksize}" + ("+dq" if self.double_quant else "")

    @classmethod
    def parse(cls, text: str) -> FourBitFormat:
        """Reads what `str` writes.

        Raises:
            ValueError: it is something else.
        """
        match = re.fullmatch(r"(\w+)/(\d+)(\+dq)?", text)
        if match is None:
            raise ValueError(f"{text!r} is no 4-bit format; one such as 'nf4/64' or 'nf4/64+dq' was expected.")
        return cls(match[1], int(match[2]), match[3] is not None)


@dataclass(frozen=True)
class NestedAbsmax:
    """Scales stored in 8 bits: `table[codes] * absmax[block] + offset` gives them back.

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
    """Gives the `(numel,)` values back in `dtype`; products are taken in fp32 and rounded once."""
    # bitsandbytes compiles a kernel per shape for these on a CPU, which costs seconds each
    library_compiles = codes.device.type == "cpu" and (numel % 2 or storage.blocksize >= 2048)
    if library_compiles:
        return dequantize_reference(codes, absmax, numel, storage, dtype)
    state = bnb.QuantState(
        absmax=absmax,
        # of one dimension, the operator gives two on a CPU, while it promises one to torch.compile
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
    """Gives the fp32 scales back; all three tensors may have the same leading dimensions, `(E, ...)`."""
    num_blocks = nested.codes.shape[-1]
    scales = nested.absmax.repeat_interleave(NESTED_BLOCKSIZE, dim=-1)[..., :num_blocks]
    return dynamic_map(nested.codes.device)[nested.codes.int()] * scales + nested.offset[..., None]


@cache
def code_values(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 fp32 values that the codes stand for."""
    with _fp32_by_default():
        return bnb.get_4bit_type(quant_type, device=device)


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 fp32 values that scales in 8 bits stand for."""
    with _fp32_by_default():
        return bnb.create_dynamic_map().to(device)


@contextmanager
def _fp32_by_default() -> Iterator[None]:
    # the library makes its tables in torch's default dtype, which is 16 bits while transformers builds a model
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
