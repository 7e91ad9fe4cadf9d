"""Decoding one matrix on the device where it is, by the kernels where they can."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..quantization import Format
from .dispatch import why_no_kernels
from .operands import PackedWeight, as_kernels_read, why_not_read_as


def decode_matrix(
    tensors: Sequence[torch.Tensor], storage: Format, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """`(rows, columns)` weights, products taken in fp32 and rounded once; both ways give the same bits.

    Args:
        tensors: of one matrix, in the order of the format.
        storage: the format.
        rows: of the matrix.
        columns: of the matrix.
        dtype: of the result.
    """
    tensors = [tensor[None] for tensor in tensors]
    device = tensors[0].device
    if why_no_kernels(device, dtype) is None and why_not_read_as(storage, rows, columns) is None:
        from .kernels.decode import decode  # needs Triton
        from .kernels.launch import device_of

        with device_of(tensors[0]):
            weight = PackedWeight(as_kernels_read(tensors, storage), rows, columns, False, storage)
            return decode(weight, 0, 1, dtype)[0]
    names = storage.tensors(rows, columns)
    return storage.dequantize(dict(zip(names, tensors)), rows, columns, dtype)[0]
