"""Products of rows sorted by expert with one matrix for each expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .dispatch import choose_library_path


def multiply_groups(
    rows: torch.Tensor, matrix_of: Callable[[int], torch.Tensor], offsets: torch.Tensor, out_features: int
) -> torch.Tensor:
    """`out[s] = rows[s] @ matrix_of(e)` for the rows s of each expert e; zero for rows without an expert.

    Args:
        rows: `(S, in)`.
        matrix_of: returns the `(in, out)` matrix of an expert; called only for experts with rows.
        offsets: `(E,)` int32; copied to the host once.
    """
    out = rows.new_zeros((rows.shape[0], out_features))
    for expert, start, end in groups(offsets):
        out[start:end] = rows[start:end] @ matrix_of(expert)
    return out


def groups(offsets: torch.Tensor) -> list[tuple[int, int, int]]:
    """`(expert, first row, end row)` of every expert that has rows."""
    ends = offsets.tolist()
    return [(expert, start, end) for expert, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]


def grouped_mm(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """torch's `grouped_mm`, `(S, in) x (E, in, out)`, with rows without an expert set to zero."""
    out = torch.nn.functional.grouped_mm(rows, matrices, offs=offsets)
    # the kernel does not write these rows
    is_tail = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
    # not in place: torch.compile of torch 2.11 would return zero gradients
    return out.masked_fill(is_tail[:, None], 0)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, matrices, offsets)
        return _product(rows, matrices, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        rows, matrices, offsets = ctx.saved_tensors
        grad_rows = grad_matrices = None
        if ctx.needs_input_grad[0]:
            grad_rows = _product(grad_out, matrices.transpose(1, 2), offsets)
        if ctx.needs_input_grad[1]:
            grad_matrices = _outer_product(rows, grad_out, matrices, offsets)
        return grad_rows, grad_matrices, None


def _uses_grouped_mm(rows: torch.Tensor, matrices: torch.Tensor) -> bool:
    _, in_features, out_features = matrices.shape
    return (
        rows.shape[0] > 0
        and choose_library_path(rows.device, rows.dtype, in_features, out_features).name == "grouped_mm"
    )


def _product(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    if _uses_grouped_mm(rows, matrices):
        return grouped_mm(rows, matrices, offsets)
    if torch.compiler.is_compiling():
        return _multiply_groups_op(rows, matrices, offsets)
    return multiply_groups(rows, matrices.__getitem__, offsets, matrices.shape[2])


def _outer_product(
    rows: torch.Tensor, grad_out: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    if _uses_grouped_mm(rows, matrices):
        return torch.nn.functional.grouped_mm(rows.T, grad_out, offs=offsets)
    outer = _outer_product_op if torch.compiler.is_compiling() else _outer_product_of_groups
    return outer(rows, grad_out, offsets)


def _outer_product_of_groups(rows: torch.Tensor, grad_out: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    grad = rows.new_zeros((offsets.shape[0], rows.shape[1], grad_out.shape[1]))
    for expert, start, end in groups(offsets):
        grad[expert] = rows[start:end].T @ grad_out[start:end]
    return grad


# custom operators, since torch.compile cannot trace the loop over experts, which reads row counts on the host


@torch.library.custom_op("peft_moe_qlora::multiply_groups", mutates_args=())
def _multiply_groups_op(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return multiply_groups(rows, matrices.__getitem__, offsets, matrices.shape[2])


@_multiply_groups_op.register_fake
def _(rows, matrices, offsets):
    return rows.new_empty((rows.shape[0], matrices.shape[2]))


@torch.library.custom_op("peft_moe_qlora::outer_product_of_groups", mutates_args=())
def _outer_product_op(rows: torch.Tensor, grad_out: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return _outer_product_of_groups(rows, grad_out, offsets)


@_outer_product_op.register_fake
def _(rows, grad_out, offsets):
    return rows.new_empty((offsets.shape[0], rows.shape[1], grad_out.shape[1]))


def grouped_matmul(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`out[s] = rows[s] @ matrices[expert of s]`, differentiable in both; zero for rows without an expert.

    Args:
        rows: `(S, in)`, sorted by expert.
        matrices: `(E, in, out)`, in the dtype of `rows`.
        offsets: `(E,)` int32.
    """
    return _GroupedMatmul.apply(rows, matrices, offsets)
