"""The fused experts layer as a custom operator for `torch.compile`: no graph break, one node forward, one backward.

Operators take flat arguments; the named tuples are rebuilt inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused_steps import Planner, Saved, experts_backward, experts_forward, experts_forward_gemv
from .kept_activations import keep, take_kept, unused_output
from .kernels.launch import device_of
from .kernels.schedule import routing_size, split_routing
from .operands import Factors, Gate, PackedWeight, as_factors


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("peft_moe_qlora::experts", mutates_args=())
def _experts_op(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up_A: Tensor | None,
    up_B: Tensor | None,
    down_A: Tensor | None,
    down_B: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up: list[Tensor],
    down: list[Tensor],
    up_shape: list[int],
    down_shape: list[int],
    up_storage: str,
    down_storage: str,
    scalings: list[float],
    gate_kind: str,
    gate_interleaved: bool,
    gate_numbers: list[float],
    by_gemv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (
        hidden_states.contiguous(),
        top_k_index.contiguous(),
        top_k_weights.contiguous(),
        PackedWeight.from_flat(up, up_shape, up_storage),
        PackedWeight.from_flat(down, down_shape, down_storage),
        as_factors(up_A, up_B, scalings[0]),
        as_factors(down_A, down_B, scalings[1]),
        up_bias,
        down_bias,
        Gate(gate_kind, gate_interleaved, *gate_numbers),
    )
    with device_of(hidden_states):
        if by_gemv:
            out = experts_forward_gemv(*arguments)
            return (out, *[out.new_empty(0) for _ in range(3)], out.new_empty(0, dtype=torch.int32))
        results, unused = take_kept(), unused_output()
        if results is None:
            out, saved = experts_forward(*arguments, needs_output=unused is None)
            reduced = (_or_empty(part, out) for part in (saved.up_reduced, saved.down_reduced))
            results = (out, saved.gate_input, *reduced, saved.planner.rows.whole)
            keep(tuple([tensor.detach() for tensor in results]))
    if unused == "nan":
        results = (torch.full_like(results[0], float("nan")), *results[1:])
    # an operator must not return the same tensors twice
    return tuple([tensor.detach() for tensor in results])


@_experts_op.register_fake
def _(hidden_states, top_k_index, top_k_weights, up_A, up_B, down_A, down_B, up_bias, down_bias, up, down, up_shape,
      down_shape, up_storage, down_storage, scalings, gate_kind, gate_interleaved,
      gate_numbers, by_gemv):  # fmt: skip
    if by_gemv:
        nothing = [hidden_states.new_empty(0) for _ in range(3)]
        return (hidden_states.new_empty(hidden_states.shape), *nothing, hidden_states.new_empty(0, dtype=torch.int32))
    num_rows = top_k_index.shape[0] * top_k_index.shape[1]
    features = up_shape[1] if up_shape[2] else up_shape[0]
    return (
        torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
        hidden_states.new_empty((num_rows, features)),
        hidden_states.new_empty(0 if up_A is None else (num_rows, up_A.shape[1])),
        hidden_states.new_empty(0 if down_A is None else (num_rows, down_A.shape[1])),
        hidden_states.new_empty(routing_size(up[0].shape[0], num_rows), dtype=torch.int32),
    )


@torch.library.custom_op("peft_moe_qlora::experts_backward", mutates_args=())
def _experts_backward_op(
    grad_out: Tensor,
    hidden_states: Tensor,
    top_k_weights: Tensor,
    gate_input: Tensor,
    up_reduced: Tensor,
    down_reduced: Tensor,
    routing: Tensor,
    up_A: Tensor | None,
    up_B: Tensor | None,
    down_A: Tensor | None,
    down_B: Tensor | None,
    down_bias: Tensor | None,
    up: list[Tensor],
    down: list[Tensor],
    up_shape: list[int],
    down_shape: list[int],
    up_storage: str,
    down_storage: str,
    scalings: list[float],
    gate_kind: str,
    gate_interleaved: bool,
    gate_numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts, num_rows = up[0].shape[0], gate_input.shape[0]
    rows = split_routing(routing, num_experts, num_rows)
    with device_of(hidden_states):
        grads = experts_backward(
            grad_out.contiguous(),
            hidden_states.contiguous(),
            top_k_weights.contiguous(),
            Saved(gate_input, up_reduced, down_reduced, Planner(rows, hidden_states.dtype)),
            PackedWeight.from_flat(up, up_shape, up_storage),
            PackedWeight.from_flat(down, down_shape, down_storage),
            as_factors(up_A, up_B, scalings[0]),
            as_factors(down_A, down_B, scalings[1]),
            down_bias,
            Gate(gate_kind, gate_interleaved, *gate_numbers),
        )
    return tuple(_or_empty(grad, grad_out) for grad in grads)


@_experts_backward_op.register_fake
def _(grad_out, hidden_states, top_k_weights, gate_input, up_reduced, down_reduced, routing, up_A, up_B, down_A,
      down_B, down_bias, up, down, up_shape, down_shape, up_storage, down_storage, scalings,
      gate_kind, gate_interleaved, gate_numbers):  # fmt: skip
    inputs = (hidden_states, top_k_weights, up_A, up_B, down_A, down_B)
    return tuple(grad_out.new_empty(0) if like is None else like.new_empty(like.shape) for like in inputs)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    (hidden_states, _, top_k_weights, up_A, up_B, down_A, down_B, _, down_bias, up, down, *static, _) = inputs
    optional = (up_A, up_B, down_A, down_B, down_bias)
    ctx.is_given = [tensor is not None for tensor in optional]
    given = [tensor for tensor in optional if tensor is not None]
    ctx.save_for_backward(hidden_states, top_k_weights, *output[1:], *given)
    # not saved tensors: they are frozen and shared by all steps
    ctx.up, ctx.down, ctx.static = up, down, static
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple:
    tensors = list(ctx.saved_tensors)
    given = iter(tensors[6:])
    optional = [next(given) if is_given else None for is_given in ctx.is_given]
    grads = _experts_backward_op(grad_out, *tensors[:6], *optional, ctx.up, ctx.down, *ctx.static)
    factor_grads = [grad if is_given else None for grad, is_given in zip(grads[2:], ctx.is_given)]
    return (
        grads[0],
        None,
        grads[1],
        *factor_grads,
        None,
        None,
        [None] * len(ctx.up),
        [None] * len(ctx.down),
        *[None] * (len(ctx.static) + 1),
    )


_experts_op.register_autograd(_backward, setup_context=_setup_context)


def experts_op(
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
    by_gemv: bool,
) -> Tensor:
    """`fused_experts` as one node of a traced graph; its backward always computes all gradients.

    Args:
        by_gemv: result of `goes_by_gemv`; if True, there is no backward.
    """
    up_A, up_B, up_scaling = up_factors or (None, None, 1.0)
    down_A, down_B, down_scaling = down_factors or (None, None, 1.0)
    return _experts_op(
        hidden_states,
        top_k_index,
        top_k_weights,
        up_A,
        up_B,
        down_A,
        down_B,
        up_bias,
        down_bias,
        list(up.tensors),
        list(down.tensors),
        up.flat_shape,
        down.flat_shape,
        up.storage_name,
        down.storage_name,
        [up_scaling, down_scaling],
        gate.kind,
        gate.interleaved,
        [gate.limit, gate.alpha],
        by_gemv,
    )[0]
