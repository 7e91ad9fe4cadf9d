"""Decodes one matrix on its device, with the Triton kernels if they support it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..quantization import Format
from .dispatch import why_no_kernels
from .operands import PackedWeight, why_not_read_as


def decode_matrix(
    tensors: Sequence[torch.Tensor], storage: Format, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """`(rows, columns)` weights, multiplied in fp32 and rounded once; torch and the kernels give the same bits.

    Args:
        tensors: tensors of one matrix, in the order of the format.
        storage: the format.
        rows: number of rows.
        columns: number of columns.
        dtype: dtype of the result.
    """
    device = tensors[0].device
    if why_no_kernels(device, dtype) is None and why_not_read_as(storage, rows, columns) is None:
        return _by_kernels(tensors, storage, rows, columns, dtype)
    names = storage.tensors(rows, columns)
    stored = {name: tensor[None] for name, tensor in zip(names, tensors)}
    return storage.dequantize(stored, rows, columns, dtype)[0]


def _by_kernels(
    tensors: Sequence[torch.Tensor], storage: Format, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The same with kernels; launches are recorded once per size, since models have many linear layers."""
    from .kernels.decode import decode, frozen_tensors  # needs Triton
    from .kernels.launch import device_of
    from .kernels.launch_recorder import recorded

    def run() -> tuple[list[torch.Tensor], None]:
        return [decode(weight, 0, 1, dtype)], None

    device = tensors[0].device
    weight = PackedWeight(tuple([tensor[None] for tensor in tensors]), rows, columns, False, storage)
    inputs = frozen_tensors(weight)
    with device_of(tensors[0]):
        (out,), _ = recorded(("decode", storage, rows, columns, dtype, device), inputs, run)
    return out[0]
