"""Dequantization as a torch custom operator, for `torch.compile`.

If `torch.compile` traced the dequantization, Inductor (torch 2.11 to 2.14) would compute wrong values on a CPU for
incomplete blocks, and all intermediate tensors would be kept for the backward.
"""

from __future__ import annotations

import torch

from .format import Format, Tensors, parse_format


@torch.library.custom_op("peft_moe_qlora::dequantize", mutates_args=())
def _dequantize_op(
    tensors: list[torch.Tensor], storage: str, rows: int, columns: int, dtype: torch.dtype, parts: int
) -> torch.Tensor:
    found = parse_format(storage)
    names = found.tensors(rows, columns, parts)
    return found.dequantize(dict(zip(names, tensors)), rows, columns, dtype, parts)


@_dequantize_op.register_fake
def _(tensors, storage, rows, columns, dtype, parts):
    return tensors[0].new_empty((tensors[0].shape[0], rows, columns), dtype=dtype)


def dequantize(
    storage: Format, name: str, tensors: Tensors, rows: int, columns: int, dtype: torch.dtype, parts: int
) -> torch.Tensor:
    """Calls `storage.dequantize`, as an opaque operator under `torch.compile`; `name` is `str(storage)`."""
    if torch.compiler.is_compiling():
        return _dequantize_op(list(tensors.values()), name, rows, columns, dtype, parts)
    return storage.dequantize(tensors, rows, columns, dtype, parts)
