"""Conversion of tokens to routed rows and back: sorting by expert, gathering, weighting and summing.

There are no copies to the host and no shapes that depend on values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Routing:
    """Positions of the routed (token, chosen expert) pairs among the rows sorted by expert.

    Args:
        offsets: `(E,)` int32, exclusive end of each expert's rows.
        expert_of_row: `(S,)` int64; rows from `offsets[-1]` on have no expert here and contain the last id.
        token_of_row: `(S,)` int64, row -> token.
        row_of_pair: `(T, K)` int64, (token, choice) -> row.
        is_routed: `(T, K)` bool, False for a pair whose expert is in another process (expert parallelism).
    """

    offsets: torch.Tensor
    expert_of_row: torch.Tensor
    token_of_row: torch.Tensor
    row_of_pair: torch.Tensor
    is_routed: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.token_of_row.shape[0]


@torch.no_grad()
def route(top_k_index: torch.Tensor, num_experts: int) -> Routing:
    """Sorts the routed pairs by expert with a stable sort.

    Args:
        top_k_index: `(T, K)` integer expert ids. Pairs with an id outside `[0, num_experts)` are not computed and come
            last; transformers marks experts of other ranks with `num_experts`.
        num_experts: E.
    """
    num_tokens, top_k = top_k_index.shape
    is_routed = (top_k_index >= 0) & (top_k_index < num_experts)
    ids = torch.where(is_routed, top_k_index, num_experts).flatten()
    sorted_ids, pair_of_row = torch.sort(ids, stable=True)
    row_of_pair = torch.empty_like(pair_of_row)
    row_of_pair[pair_of_row] = torch.arange(ids.numel(), device=ids.device)
    experts = torch.arange(num_experts, device=ids.device, dtype=sorted_ids.dtype)
    return Routing(
        offsets=torch.searchsorted(sorted_ids, experts, right=True, out_int32=True),
        expert_of_row=sorted_ids.clamp(max=num_experts - 1),
        token_of_row=pair_of_row // max(top_k, 1),
        row_of_pair=row_of_pair.view(num_tokens, top_k),
        is_routed=is_routed,
    )


class _GatherRows(torch.autograd.Function):
    """Indexing with a backward that sums the K rows of a token in fp32 in a fixed order, without atomic additions."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, routing: Routing) -> torch.Tensor:
        ctx.routing = routing
        return hidden_states.index_select(0, routing.token_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        row_of_pair = ctx.routing.row_of_pair
        num_tokens, top_k = row_of_pair.shape
        total = grad_rows.new_zeros((num_tokens, grad_rows.shape[1]), dtype=torch.float32)
        for choice in range(top_k):
            total += grad_rows[row_of_pair[:, choice]]
        return total.to(grad_rows.dtype), None


class _CombineRows(torch.autograd.Function):
    """`out[t] = sum_k weights[t, k] * rows[row_of_pair[t, k]]` in fp32."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, routing: Routing) -> torch.Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.row_of_pair = row_of_pair = routing.row_of_pair
        num_tokens, top_k = row_of_pair.shape
        out = rows.new_zeros((num_tokens, rows.shape[1]), dtype=torch.float32)
        for choice in range(top_k):
            # not in place: torch.compile of torch 2.11 would return zero gradients
            out = out + rows[row_of_pair[:, choice]] * weights[:, choice, None].float()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, weights = ctx.saved_tensors
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
        for choice in range(weights.shape[1]):
            row = ctx.row_of_pair[:, choice]
            grad_rows[row] = (grad_out * weights[:, choice, None].float()).to(rows.dtype)
            grad_weights[:, choice] = (grad_out * rows[row]).sum(-1).to(weights.dtype)
        return grad_rows, grad_weights, None


def gather_rows(hidden_states: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The routed rows: `(T, H)` -> `(S, H)`."""
    return _GatherRows.apply(hidden_states, routing)


def combine_rows(rows: torch.Tensor, top_k_weights: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Multiplies the routed rows by the weights and sums those of each token: `(S, H)`, `(T, K)` -> `(T, H)` fp32.

    Pairs that are not computed here count as zero, also in the gradient of their weight.
    """
    weights = top_k_weights.masked_fill(~routing.is_routed, 0)
    return _CombineRows.apply(rows, weights, routing)
