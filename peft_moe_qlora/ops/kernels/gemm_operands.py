"""Operands of products of rows with low-rank factors or weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import next_power_of_2


class Rows(NamedTuple):
    """The left operand: rows in the order of the experts, or tokens to gather them from.

    Args:
        tensor: `(S, features)`, or `(T, features)` with `pair_of_row`; contiguous in the last dimension.
        pair_of_row: `(S,)` int32, row -> token * K + choice; None if the rows are already sorted.
        top_k: K; 1 if the rows are already sorted.
    """

    tensor: torch.Tensor
    pair_of_row: torch.Tensor | None = None
    top_k: int = 1

    @property
    def num_rows(self) -> int:
        return (self.tensor if self.pair_of_row is None else self.pair_of_row).shape[0]


class LowRankTerm(NamedTuple):
    """`reduced (S, R)` times `factor[e] (N, R)` transposed, added to the product.

    Args:
        reduced: `(S, R)`, in the dtype of the rows, including the scaling.
        factor: `(E, N, R)` view with any strides, in any floating-point dtype.
    """

    reduced: torch.Tensor
    factor: torch.Tensor


@triton.jit
def row_places(rows, PAIR_OF_ROW, TOP_K: tl.constexpr, GATHER: tl.constexpr):
    """Positions of the rows in the left operand."""
    if GATHER:
        return tl.load(PAIR_OF_ROW + rows) // TOP_K
    return rows


def padded_rank(rank: int) -> int:
    """The rank padded for matrix instructions: a power of two, at least 16."""
    return max(16, next_power_of_2(rank))
