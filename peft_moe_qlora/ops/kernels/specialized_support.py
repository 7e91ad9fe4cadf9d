"""Which products the kernel with specialized warps (`specialized_gemm`) supports."""

from __future__ import annotations

from functools import cache

import torch
import triton
from packaging.version import Version

from ..operands import PackedWeight
from .codec import runs_ptx
from .gemm_operands import LowRankTerm, Rows

FIRST_UNKNOWN_TRITON = (3, 10)
"""The kernel was compiled with earlier versions; the interface of Gluon, in which it is written, is experimental."""


def supports_specialized(
    device: torch.device, dtype: torch.dtype, codes: str | None, n: int, k: int, rank: int
) -> bool:
    """Whether this kernel can compute a product, if its operands suit it (`can_specialize`).

    Args:
        device: device of the product.
        dtype: dtype of the rows.
        codes: `kernel_codes` of the weight; None if it is not packed in whole blocks.
        n: columns of the result; a multiple of 8.
        k: length of the contraction; a multiple of 8.
        rank: rank of the low-rank term; even, see `can_specialize`.
    """
    has_sizes = n % 8 == 0 and k % 8 == 0 and rank % 2 == 0
    return codes is not None and dtype.itemsize == 2 and has_sizes and _runs_on(device)


def can_specialize(rows: Rows, weight: PackedWeight, low_rank: LowRankTerm | None) -> bool:
    """Whether the operands of a supported product suit the kernel.

    It is compiled for operands that start at multiples of 16 bytes. Its copies are of at least 4 bytes, so rows of the
    low-rank term must start at multiples of them: the rank must be even.
    """
    has_even_rank = low_rank is None or low_rank.reduced.shape[1] % 2 == 0
    return has_even_rank and all(tensor.data_ptr() % 16 == 0 for tensor in (rows.tensor, weight.tensors[0]))


@cache
def _runs_on(device: torch.device) -> bool:
    is_known = Version(triton.__version__).release[:2] < FIRST_UNKNOWN_TRITON
    return is_known and runs_ptx(device) and torch.cuda.get_device_capability(device) == (9, 0)
