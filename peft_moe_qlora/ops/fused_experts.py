"""The whole experts layer as one differentiable function."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused_op import experts_op
from .fused_steps import (
    Planner,
    Saved,
    experts_backward,
    experts_forward,
    experts_forward_gemv,
    goes_by_gemv,
)
from .kept_activations import has_backward, keep, take_kept, unused_output
from .kernels.decode import frozen_tensors
from .kernels.launch import device_of
from .kernels.launch_recorder import recorded
from .kernels.schedule import split_routing, split_tiles
from .operands import Factors, Gate, PackedWeight, as_factors


def _signatures(tensors: Iterable[Tensor | None]) -> list[tuple | None]:
    return [None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


class _FusedExperts(torch.autograd.Function):
    """For eager mode, in which the dispatch of a custom operator takes longer than all its launches."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        up_A: Tensor | None,
        up_B: Tensor | None,
        down_A: Tensor | None,
        down_B: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        static: tuple[PackedWeight, PackedWeight, Gate, float, float],
    ) -> Tensor:
        up, down, gate, up_scaling, down_scaling = static
        hidden_states, top_k_weights = hidden_states.contiguous(), top_k_weights.contiguous()
        tensors = (hidden_states, top_k_index.contiguous(), top_k_weights)
        factors = (up_A, up_B, down_A, down_B)
        biases = (up_bias, down_bias)
        unused = unused_output()

        def run() -> tuple[list[Tensor | None], list[tuple[int, ...]]]:
            out, kept = experts_forward(
                *tensors,
                up,
                down,
                as_factors(up_A, up_B, up_scaling),
                as_factors(down_A, down_B, down_scaling),
                *biases,
                gate,
                needs_output=unused is None,
            )
            planner = kept.planner
            tiles = [tiles.whole for tiles in planner.tiles.values()]
            return [out, *kept[:3], planner.rows.whole, *tiles], list(planner.tiles)

        given = (*tensors, *factors, *biases)
        key = (*_signatures(given), up.signature, down.signature, *static[2:])
        taken = take_kept()
        if taken is None:
            inputs = (*given, *frozen_tensors(up, down))
            (out, *kept), cuts = recorded(("forward", unused is None, *key), inputs, run)
            keep((out.detach(), kept, cuts))  # detached: autograd changes the returned tensor
        else:
            kept_out, kept, cuts = taken
            out = kept_out.detach()
        if unused == "nan":
            out = torch.full_like(out, float("nan"))
        ctx.static, ctx.key, ctx.cuts = static, key, cuts
        ctx.save_for_backward(hidden_states, top_k_weights, *factors, down_bias, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        up, down, gate, up_scaling, down_scaling = ctx.static
        saved = ctx.saved_tensors  # read once: checkpointing unpacks them only once
        hidden_states, top_k_weights, *factors, down_bias, gate_input, up_reduced, down_reduced, whole = saved[:11]
        whole_tiles = saved[11:]
        grad_out = grad_out.contiguous()
        needs = (ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:7]))

        def run() -> tuple[list[Tensor | None], None]:
            rows = split_routing(whole, up.num_experts, gate_input.shape[0])
            tiles = [split_tiles(ints, up.num_experts, cut) for ints, cut in zip(whole_tiles, ctx.cuts)]
            planner = Planner(rows, hidden_states.dtype, tiles)
            grads = experts_backward(
                grad_out,
                hidden_states,
                top_k_weights,
                Saved(gate_input, up_reduced, down_reduced, planner),
                up,
                down,
                as_factors(*factors[:2], up_scaling),
                as_factors(*factors[2:], down_scaling),
                down_bias,
                gate,
                *needs,
            )
            return list(grads), None

        with device_of(hidden_states):
            inputs = (grad_out, *saved, *frozen_tensors(up, down))
            grads, _ = recorded(("backward", needs, grad_out.dtype, ctx.key), inputs, run)
        return grads[0], None, *grads[1:], None, None, None


def _forward_gemv(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: PackedWeight,
    down: PackedWeight,
    up_factors: Factors | None,
    down_factors: Factors | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Gate,
) -> Tensor:
    tensors = (hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous())
    factors = (up_factors, down_factors)
    given = (*tensors, *[factor for pair in factors if pair for factor in pair[:2]], up_bias, down_bias)
    scalings = [pair and float(pair.scaling) for pair in factors]
    key = ("by pairs", *_signatures(given), up.signature, down.signature, gate, *scalings)

    def run() -> tuple[list[Tensor | None], None]:
        return [experts_forward_gemv(*tensors, up, down, *factors, up_bias, down_bias, gate)], None

    (out,), _ = recorded(key, (*given, *frozen_tensors(up, down)), run)
    return out


def fused_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: PackedWeight,
    down: PackedWeight,
    gate: Gate,
    up_factors: Factors | None = None,
    down_factors: Factors | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Output of the experts of a MoE layer, differentiable in all inputs except weights and biases.

    Args:
        hidden_states: `(T, H)` in bfloat16, float16 or float32, T > 0.
        top_k_index: `(T, K)` integer ids; pairs with ids outside `[0, E)` are not computed and count as zero.
        top_k_weights: `(T, K)` in any floating-point dtype.
        up: the first projection, gate and up fused.
        down: the second projection.
        gate: the gate between the two projections.
        up_factors: low-rank term of the first projection, in any floating-point dtype.
        down_factors: low-rank term of the second projection.
        up_bias: `(E, 2I)`, frozen.
        down_bias: `(E, H)`, frozen.

    Returns:
        `(T, H)` in the dtype of the hidden states. Deterministic; no copy to the host.

    Raises:
        ValueError: shapes or devices do not match, or factors have rank 0.
    """
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    arguments = (hidden_states, top_k_index, top_k_weights, up, down)
    rest = (up_factors, down_factors, up_bias, down_bias)
    needs_gradients = torch.is_grad_enabled() and any(
        tensor.requires_grad
        for tensor in (hidden_states, top_k_weights, *(up_factors or ())[:2], *(down_factors or ())[:2])
    )
    # torch.compile cannot read what belongs to a thread
    needs_gradients = needs_gradients or (not torch.compiler.is_compiling() and has_backward())
    by_gemv = not needs_gradients and goes_by_gemv(
        top_k_index.numel(), hidden_states.dtype, up, down, up_factors, down_factors
    )
    if torch.compiler.is_compiling():
        return experts_op(*arguments, *rest, gate, by_gemv)
    with device_of(hidden_states):
        if by_gemv:
            return _forward_gemv(*arguments, *rest, gate)
        up_A, up_B, up_scaling = up_factors or (None, None, 1.0)
        down_A, down_B, down_scaling = down_factors or (None, None, 1.0)
        static = (up, down, gate, float(up_scaling), float(down_scaling))
        return _FusedExperts.apply(
            hidden_states, top_k_index, top_k_weights, up_A, up_B, down_A, down_B, up_bias, down_bias, static
        )
