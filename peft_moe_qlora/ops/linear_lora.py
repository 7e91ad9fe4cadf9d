"""A frozen linear layer with its low-rank term: the weight is decoded once, and the term is added to the product.

    y = x W^T + bias + scaling * (x A^T) B^T

Factors are cast to the dtype of the product; the scaling is applied in the small products. The backward decodes the
weight again. Letters: T rows, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..quantization import Format, FourBitFormat, dynamic_map, parse_format
from .decode_matrix import decode_matrix
from .held_casts import cast_factor

MOST_ROWS_OF_LIBRARY = 512
"""Number of rows up to which the product of bitsandbytes is used, which decodes inside the product."""


class StoredMatrix(NamedTuple):
    """The `(rows, columns)` weight of a layer, valid for one product, since sharding engines move tensors.

    Args:
        tensors: tensors of the format in order, or only the 16-bit weight.
        rows: rows of the weight, `out_features` of the layer.
        columns: columns of the weight.
        storage: the format; None if the weight is not packed.
        storage_name: name of the format, precomputed since torch.compile cannot format numbers into strings.
    """

    tensors: tuple[Tensor, ...]
    rows: int
    columns: int
    storage: Format | None = None
    storage_name: str = ""

    def decode(self, dtype: torch.dtype) -> Tensor:
        if self.storage is None:
            return _cast(self.tensors[0].detach(), dtype)
        return decode_matrix(self.tensors, self.storage, self.rows, self.columns, dtype)


def linear_dtype(inputs: Tensor) -> torch.dtype:
    """Dtype of the product of an nn.Linear: autocast's, except for fp64 inputs, or else that of the inputs."""
    device_type = inputs.device.type
    if torch.is_autocast_enabled(device_type) and inputs.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return inputs.dtype


def bias_gradient(grad_out: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return grad_out.reshape(-1, grad_out.shape[-1]).sum(dim=0, dtype=dtype)


def linear_lora(
    inputs: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    matrix: StoredMatrix,
    matrix_of: Callable[[], StoredMatrix],
    dtype: torch.dtype,
    term_inputs: Tensor | None = None,
) -> Tensor:
    """`(..., in)` -> `(..., out)` in `dtype`, differentiable in all but the weight.

    Args:
        inputs: inputs in any floating-point dtype, saved unchanged for the backward.
        bias: `(out,)`.
        A: `(R, in)`, in any floating-point dtype, like B; gradients have the dtype of the factor.
        B: `(out, R)`.
        scaling: factor of the term.
        matrix: the weight.
        matrix_of: function that returns the weight in the backward, when its tensors may have been replaced.
        dtype: dtype of the products.
        term_inputs: inputs of the term if they differ, for example after dropout; None for `inputs`.
    """
    if torch.compiler.is_compiling():
        term_inputs = None if term_inputs is None else term_inputs.to(dtype)
        shape = [matrix.rows, matrix.columns]
        packed = (list(matrix.tensors), matrix.storage_name, shape)
        return _linear_lora_op(inputs.to(dtype), term_inputs, bias, A, B, scaling, *packed)[0]
    if not torch.is_grad_enabled():
        return _forward(inputs, term_inputs, bias, A, B, scaling, matrix, dtype)[0]
    return _LinearLora.apply(inputs, term_inputs, bias, A, B, scaling, matrix, matrix_of, dtype)


def low_rank_term(inputs: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Low-rank term of a further adapter, in the dtype of the inputs."""
    dtype = inputs.dtype
    return linear(linear(inputs, cast_factor(A, dtype)) * scaling, cast_factor(B, dtype))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disables autocast, so that products have the dtype of their operands."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def _forward(
    inputs: Tensor,
    term_inputs: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    matrix: StoredMatrix,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The output, and `scaling * x A^T`, `(T, R)`."""
    with without_autocast(inputs.device):
        rows = _as_rows(inputs, dtype)
        out = _product(rows, None if bias is None else _cast(bias, dtype), matrix, inputs.shape[:-1])
        term_rows = rows if term_inputs is None else _as_rows(term_inputs, dtype)
        reduced = _scaled_product(term_rows, cast_factor(A, dtype).t(), scaling)
        out.view(-1, matrix.rows).addmm_(reduced, cast_factor(B, dtype).t())
    return out, reduced


def _as_rows(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return _cast(inputs.reshape(-1, inputs.shape[-1]), dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # even a no-op cast takes nearly as long as a launch
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _product(rows: Tensor, bias: Tensor | None, matrix: StoredMatrix, shape: torch.Size) -> Tensor:
    """Product in its final shape, since the caller cannot write in place to a view created here."""
    if _goes_by_library(rows, matrix):
        return _library_product(rows.view(*shape, matrix.columns), bias, matrix)
    out = rows.new_empty((*shape, matrix.rows))
    out_rows, weight = out.view(-1, matrix.rows), matrix.decode(rows.dtype).t()
    if bias is None:
        torch.mm(rows, weight, out=out_rows)
    else:
        torch.addmm(bias, rows, weight, out=out_rows)
    return out


def _goes_by_library(rows: Tensor, matrix: StoredMatrix) -> bool:
    storage, is_cuda = matrix.storage, rows.is_cuda
    return (
        isinstance(storage, FourBitFormat)
        and 0 < rows.shape[0] <= MOST_ROWS_OF_LIBRARY
        and (is_cuda or storage.blocksize < 2048)  # for these, bitsandbytes would compile a kernel on a CPU
        and matrix.columns % storage.blocksize == 0
        and rows.dtype != torch.float64
    )


def _library_product(inputs: Tensor, bias: Tensor | None, matrix: StoredMatrix) -> Tensor:
    codes, absmax, *nested = matrix.tensors
    storage, codes = matrix.storage, codes.view(-1, 1)
    rest = (storage.blocksize, storage.quant_type, bias)
    product = torch.ops.bitsandbytes.gemm_4bit.default
    shape = (matrix.rows, matrix.columns)
    if not nested:
        return product(inputs, codes, shape, absmax.view(torch.float32), *rest)
    group_absmax, offset = (tensor.view(torch.float32) for tensor in nested)
    return product(inputs, codes, shape, group_absmax, *rest, absmax, dynamic_map(inputs.device), offset)


def _scaled_product(rows: Tensor, factor: Tensor, scaling: float) -> Tensor:
    """`scaling * rows @ factor`, in the dtype of the rows."""
    out = rows.new_empty((rows.shape[0], factor.shape[1]))
    # with beta=0, the uninitialized memory is not read
    return out.addmm_(rows, _cast(factor, rows.dtype), beta=0, alpha=scaling)


def _backward(
    grad_out: Tensor,
    rows: Tensor | None,
    reduced: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    matrix_of: Callable[[], StoredMatrix],
    dtype: torch.dtype,
    has_term_inputs: bool,
    needs: Sequence[bool],
    is_differentiable: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Required gradients of inputs, term inputs, A and B; the first two as rows in `dtype`.

    Args:
        rows: inputs of A; None if no factor requires a gradient.
        reduced: `scaling * x A^T` of the forward; None if B requires no gradient.
        needs: the gradients to compute.
        is_differentiable: whether the backward may itself be differentiated (`create_graph=True`).
    """
    of_inputs, of_term_inputs, of_A, of_B = needs
    grad_inputs = grad_term_inputs = grad_A = grad_B = None
    with without_autocast(grad_out.device):
        grad = _as_rows(grad_out, dtype)
        if of_inputs:
            grad_inputs = torch.mm(grad, matrix_of().decode(dtype))
        of_term = of_term_inputs if has_term_inputs else of_inputs
        if of_term or of_A:
            grad_reduced = _scaled_product(grad, B, scaling)
        if of_term and has_term_inputs:
            grad_term_inputs = torch.mm(grad_reduced, _cast(A, dtype))
        elif of_term:
            grad_inputs.addmm_(grad_reduced, _cast(A, dtype))
        if of_A:
            grad_A = _factor_gradient(grad_reduced, _cast(rows, dtype), A.dtype, is_differentiable)
        if of_B:
            if is_differentiable:  # the saved tensor is detached from the graph
                reduced = _scaled_product(_cast(rows, dtype), A.t(), scaling)
            grad_B = _factor_gradient(grad, reduced, B.dtype, is_differentiable)
    return grad_inputs, grad_term_inputs, grad_A, grad_B


def _factor_gradient(left: Tensor, right: Tensor, dtype: torch.dtype, is_differentiable: bool) -> Tensor:
    """`left^T right`; for fp32 factors, the sum is not rounded to 16 bits."""
    if dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        if left.is_cuda and not is_differentiable:  # not differentiable, and not available on the CPU
            return torch.mm(left.t(), right, out_dtype=dtype)
        left, right = _cast(left, dtype), _cast(right, dtype)
    return _cast(torch.mm(left.t(), right), dtype)


class _LinearLora(torch.autograd.Function):
    """For eager mode, in which the dispatch of a custom operator takes longer than a small product."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        term_inputs: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        matrix: StoredMatrix,
        matrix_of: Callable[[], StoredMatrix],
        dtype: torch.dtype,
    ) -> Tensor:
        out, reduced = _forward(inputs, term_inputs, bias, A, B, scaling, matrix, dtype)
        of_A, of_B = ctx.needs_input_grad[3:5]
        rows = inputs if term_inputs is None else term_inputs
        ctx.save_for_backward(rows if of_A or of_B else None, reduced if of_B else None, A, B)
        ctx.static = scaling, matrix_of, dtype, term_inputs is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.inputs = inputs.shape, inputs.dtype, None if term_inputs is None else term_inputs.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        rows, *saved = ctx.saved_tensors
        shape, dtype, term_dtype = ctx.inputs
        of_inputs, of_term_inputs, of_bias, *of_factors = ctx.needs_input_grad[:5]
        rows = None if rows is None else rows.reshape(-1, shape[-1])
        needs = (of_inputs, of_term_inputs, *of_factors)
        is_differentiable = torch.is_grad_enabled()
        grads = _backward(grad_out, rows, *saved, *ctx.static, needs, is_differentiable)
        grad_inputs, grad_term_inputs, *of_factors = grads
        if grad_inputs is not None:
            grad_inputs = _cast(grad_inputs.view(shape), dtype)
        if grad_term_inputs is not None:
            grad_term_inputs = _cast(grad_term_inputs.view(shape), term_dtype)
        grad_bias = bias_gradient(grad_out, ctx.bias_dtype) if of_bias else None
        return grad_inputs, grad_term_inputs, grad_bias, *of_factors, None, None, None, None


# The same as custom operators for torch.compile: one node in the forward and one in the backward, without saving the
# decoded weight


def _matrix(tensors: list[Tensor], storage: str, shape: list[int]) -> StoredMatrix:
    return StoredMatrix(tuple(tensors), *shape, parse_format(storage) if storage else None, storage)


@torch.library.custom_op("peft_moe_qlora::linear_lora", mutates_args=())
def _linear_lora_op(
    inputs: Tensor,
    term_inputs: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    tensors: list[Tensor],
    storage: str,
    shape: list[int],
) -> tuple[Tensor, Tensor]:
    matrix = _matrix(tensors, storage, shape)
    return _forward(inputs, term_inputs, bias, A, B, scaling, matrix, inputs.dtype)


@_linear_lora_op.register_fake
def _(inputs, term_inputs, bias, A, B, scaling, tensors, storage, shape):
    *sizes, _ = inputs.shape
    return inputs.new_empty((*sizes, shape[0])), inputs.new_empty((prod(sizes), A.shape[0]))


@torch.library.custom_op("peft_moe_qlora::linear_lora_backward", mutates_args=())
def _linear_lora_backward_op(
    grad_out: Tensor,
    inputs: Tensor,
    reduced: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    tensors: list[Tensor],
    storage: str,
    shape: list[int],
    has_term_inputs: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrix, rows = _matrix(tensors, storage, shape), inputs.reshape(-1, shape[1])
    static = (scaling, lambda: matrix, inputs.dtype, has_term_inputs)
    grads = _backward(grad_out, rows, reduced, A, B, *static, needs)
    of_rows = (None if grad is None else grad.view(inputs.shape) for grad in grads[:2])
    return tuple(inputs.new_empty(0) if grad is None else grad for grad in (*of_rows, *grads[2:]))


@_linear_lora_backward_op.register_fake
def _(grad_out, inputs, reduced, A, B, scaling, tensors, storage, shape, has_term_inputs, needs):
    likes = (inputs, inputs, A, B)
    return tuple(like.new_empty(like.shape) if need else inputs.new_empty(0) for like, need in zip(likes, needs))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    inputs, term_inputs, bias, A, B, *static = inputs
    ctx.save_for_backward(inputs if term_inputs is None else term_inputs, output[1], A, B)
    # not a saved tensor: the weight is frozen and shared by all steps
    ctx.static = *static, term_inputs is not None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_of_op(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple:
    of_inputs, of_term_inputs, of_bias, *of_factors = ctx.needs_input_grad[:5]
    needs = [of_inputs, of_term_inputs, *of_factors]
    grads = _linear_lora_backward_op(grad_out, *ctx.saved_tensors, *ctx.static, needs)
    grad_inputs, grad_term_inputs, *of_factors = (grad if need else None for grad, need in zip(grads, needs))
    grad_bias = bias_gradient(grad_out, ctx.bias_dtype) if of_bias else None
    nothing = (None, [None] * len(ctx.static[1]), None, None)
    return grad_inputs, grad_term_inputs, grad_bias, *of_factors, *nothing


_linear_lora_op.register_autograd(_backward_of_op, setup_context=_setup_context)
