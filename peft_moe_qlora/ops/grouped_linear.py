"""One projection of all experts: frozen weights decoded on the fly, plus low-rank terms.

Weights are decoded for the forward product and again for the input gradient; no 16-bit copy is kept in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ..quantization import Stack
from .dispatch import choose_library_path, choose_path
from .grouped_matmul import grouped_matmul, grouped_mm, multiply_groups
from .operands import PackedWeight, packed_weight, why_not_read
from .routing import Routing


@dataclass(frozen=True)
class LowRank:
    """Low-rank term of an adapter: `scaling * (dropout(x) A^T) B^T`, per expert (LoRA, arXiv:2106.09685).

    Args:
        A: `(E, R, in)`.
        B: `(E, out, R)`.
        scaling: factor of the product.
        dropout: applied to the routed rows before A; None for no dropout.
        token_mask: `(T,)` bool mask of the tokens to which the adapter applies; None for all tokens.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dropout: nn.Module | None = None
    token_mask: torch.Tensor | None = None


class _FrozenGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, stack: Stack, offsets: torch.Tensor) -> torch.Tensor:
        ctx.stack = stack
        ctx.save_for_backward(offsets)
        return _frozen_product(rows, stack, offsets, as_stored=stack.is_transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return _frozen_product(grad_out, ctx.stack, offsets, as_stored=not ctx.stack.is_transposed), None, None


def _frozen_product(rows: torch.Tensor, stack: Stack, offsets: torch.Tensor, as_stored: bool) -> torch.Tensor:
    """Product of the rows with the matrices as stored (`as_stored`) or with their transposes."""
    _, stored_rows, stored_columns = stack.shape
    in_features, out_features = (stored_rows, stored_columns) if as_stored else (stored_columns, stored_rows)
    choose = choose_path if why_not_read(stack) is None else choose_library_path
    path = choose(rows.device, rows.dtype, in_features, out_features).name
    if rows.shape[0] and path == "grouped_mm":
        matrices = stack.decode(rows.dtype)
        return grouped_mm(rows, matrices if as_stored else matrices.transpose(1, 2), offsets)
    if torch.compiler.is_compiling():
        # torch.compile cannot trace a launch and does not know the number of rows of an expert
        weight = packed_weight(stack)
        tensors, by_kernels = list(weight.tensors), path == "triton"
        return _frozen_product_op(
            rows, tensors, offsets, weight.flat_shape, weight.storage_name, as_stored, by_kernels
        )
    if rows.shape[0] and path == "triton":
        return _by_kernels(rows, packed_weight(stack), offsets, as_stored)
    return _by_expert(rows, stack, offsets, as_stored, out_features)


def _by_kernels(rows: torch.Tensor, weight: PackedWeight, offsets: torch.Tensor, as_stored: bool) -> torch.Tensor:
    from .fused_steps import frozen_product

    return frozen_product(rows, weight, offsets, for_input_gradient=as_stored != weight.is_transposed)


def _by_expert(
    rows: torch.Tensor, weight: Stack | PackedWeight, offsets: torch.Tensor, as_stored: bool, out_features: int
) -> torch.Tensor:
    def matrix_of(expert: int) -> torch.Tensor:
        matrix = weight.decode_expert(expert, rows.dtype)
        return matrix if as_stored else matrix.T

    return multiply_groups(rows, matrix_of, offsets, out_features)


@torch.library.custom_op("peft_moe_qlora::frozen_product", mutates_args=())
def _frozen_product_op(
    rows: torch.Tensor,
    tensors: list[torch.Tensor],
    offsets: torch.Tensor,
    flat_shape: list[int],
    storage: str,
    as_stored: bool,
    by_kernels: bool,
) -> torch.Tensor:
    weight = PackedWeight.from_flat(tensors, flat_shape, storage)
    if rows.shape[0] and by_kernels:
        return _by_kernels(rows, weight, offsets, as_stored)
    return _by_expert(rows, weight, offsets, as_stored, weight.columns if as_stored else weight.rows)


@_frozen_product_op.register_fake
def _(rows, tensors, offsets, flat_shape, storage, as_stored, by_kernels):
    return rows.new_empty((rows.shape[0], flat_shape[1] if as_stored else flat_shape[0]))


def _low_rank_product(rows: torch.Tensor, term: LowRank, routing: Routing) -> torch.Tensor:
    A, B = term.A.to(rows.dtype), term.B.to(rows.dtype)
    # grouped_mm requires a multiple of 8, so pad the rank with zeros
    padding = -A.shape[1] % 8 if choose_library_path(rows.device, rows.dtype, 8, 8).name == "grouped_mm" else 0
    if padding:
        A, B = pad(A, (0, 0, 0, padding)), pad(B, (0, padding))
    if term.dropout is not None:
        rows = term.dropout(rows)
    lora_x = grouped_matmul(rows, A.transpose(1, 2), routing.offsets) * term.scaling
    if term.token_mask is not None:
        lora_x = lora_x * term.token_mask[routing.token_of_row, None]
    return grouped_matmul(lora_x, B.transpose(1, 2), routing.offsets)


def grouped_linear(
    rows: torch.Tensor,
    stack: Stack,
    routing: Routing,
    bias: torch.Tensor | None = None,
    low_rank: Sequence[LowRank] = (),
) -> torch.Tensor:
    """Applies the linear layer of its expert to each routed row: `(S, in)` -> `(S, out)` in the dtype of `rows`.

    Args:
        rows: `(S, in)`, sorted by expert.
        stack: the frozen weights.
        routing: assignment of rows to experts.
        bias: `(E, out)`.
        low_rank: low-rank terms of the adapters.
    """
    out = _FrozenGroupedLinear.apply(rows, stack, routing.offsets)
    for term in low_rank:
        out = out + _low_rank_product(rows, term, routing)
    if bias is not None:
        out = out + bias.to(rows.dtype)[routing.expert_of_row]
    return out
