"""Forward and backward of the gate between the two projections."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..operands import Gate
from .launch import cdiv, launch, next_power_of_2
from .launch_recorder import allocate
from .schedule import RoutedRows


@triton.jit
def _clamp_gate(gate, up, limit, KIND: tl.constexpr):
    if KIND == "clamped_silu" or KIND == "swiglu_oai":
        # like torch, propagate NaN
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    return gate, up


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def gate_value(gate, up, limit, alpha, KIND: tl.constexpr):
    """The gated value of gate and up, in fp32."""
    gate, up = _clamp_gate(gate, up, limit, KIND)
    if KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return 0.5 * gate * (1.0 + _tanh(inner)) * up
    if KIND == "swiglu_oai":
        return (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def gate_derivatives(gate, up, limit, alpha, KIND: tl.constexpr):
    """The gated value and its derivatives with respect to gate and up, in fp32."""
    g, u = _clamp_gate(gate, up, limit, KIND)
    if KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        tanh = _tanh(inner)
        act = 0.5 * g * (1.0 + tanh)
        slope = 0.5 * (1.0 + tanh) + 0.5 * g * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
        value, by_gate, by_up = act * u, slope * u, act
    elif KIND == "swiglu_oai":
        sigmoid = tl.sigmoid(alpha * g)
        act = g * sigmoid
        slope = sigmoid * (1.0 + alpha * g * (1.0 - sigmoid))
        value, by_gate, by_up = act * (u + 1.0), slope * (u + 1.0), act
    else:
        sigmoid = tl.sigmoid(g)
        act = g * sigmoid
        slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
        value, by_gate, by_up = act * u, slope * u, act
    if KIND == "clamped_silu" or KIND == "swiglu_oai":
        by_gate = tl.where(gate <= limit, by_gate, 0.0)
        by_up = tl.where((up >= -limit) & (up <= limit), by_up, 0.0)
    return value, by_gate, by_up


@triton.jit
def _gate_places(X, row, is_row, first_column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Pointers to gate, and to up if interleaved, in rows of `2 * COLUMNS`, and their mask."""
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    column = STEP * first_column + tl.arange(0, STEP * WIDTH)
    place = X + row[:, None].to(tl.int64) * (2 * COLUMNS) + column[None, :]
    return place, is_row[:, None] & (column < STEP * COLUMNS)[None, :]


@triton.jit
def load_gate_inputs(
    X,
    row,
    is_row,
    first_column,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """`(HEIGHT, WIDTH)` gate and up in fp32, from rows of `2 * COLUMNS`; zero outside of rows and columns."""
    place, is_there = _gate_places(X, row, is_row, first_column, COLUMNS, WIDTH, INTERLEAVED)
    if INTERLEAVED:
        both = tl.load(place, mask=is_there, other=0.0)
        gate, up = tl.split(tl.reshape(both, (HEIGHT, WIDTH, 2)))
    else:
        gate = tl.load(place, mask=is_there, other=0.0)
        up = tl.load(place + COLUMNS, mask=is_there, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def store_gate_inputs(
    X,
    row,
    is_row,
    first_column,
    gate,
    up,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Stores `(HEIGHT, WIDTH)` gate and up where `load_gate_inputs` loads them."""
    place, is_there = _gate_places(X, row, is_row, first_column, COLUMNS, WIDTH, INTERLEAVED)
    if INTERLEAVED:
        tl.store(place, tl.reshape(tl.join(gate, up), (HEIGHT, 2 * WIDTH)), mask=is_there)
    else:
        tl.store(place, gate, mask=is_there)
        tl.store(place + COLUMNS, up, mask=is_there)


@triton.jit(do_not_specialize=["num_rows", "limit", "alpha"])
def _gate_kernel(
    X,
    OUT,
    num_rows,
    limit,
    alpha,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    first = tl.program_id(1) * WIDTH
    column = first + tl.arange(0, WIDTH)
    is_row = row < num_rows
    gate, up = load_gate_inputs(X, row, is_row, first, COLUMNS, HEIGHT, WIDTH, INTERLEAVED)
    value = gate_value(gate, up, limit, alpha, KIND)
    place = OUT + row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    tl.store(place, value.to(OUT.dtype.element_ty), mask=is_row[:, None] & (column < COLUMNS)[None, :])


def apply_gate(x: torch.Tensor, gate: Gate) -> torch.Tensor:
    """`(S, 2I)` -> `(S, I)`, in fp32 and rounded once."""
    num_rows, columns = x.shape[0], x.shape[1] // 2
    out = allocate((num_rows, columns), x.dtype, x.device)
    width = min(1024, next_power_of_2(columns))
    height = max(1, 1024 // width)
    launch(
        _gate_kernel,
        (cdiv(num_rows, height), cdiv(columns, width)),
        (x, out),
        (num_rows, gate.limit, gate.alpha),
        COLUMNS=columns,
        KIND=gate.kind,
        INTERLEAVED=gate.interleaved,
        HEIGHT=height,
        WIDTH=width,
    )
    return out


@triton.jit(do_not_specialize=["num_rows", "limit", "alpha"])
def _gate_backward_kernel(
    X,
    GRAD,
    WEIGHTS,
    PAIR_OF_ROW,
    ROW_TERM,
    ENDS,
    OUT,
    GRAD_WEIGHTS,
    num_rows,
    limit,
    alpha,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_ROW_TERM: tl.constexpr,
    KEEPS_VALUE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    is_row = row < num_rows
    is_here = row < tl.load(ENDS + NUM_EXPERTS - 1)
    source = tl.where(is_row, row, 0)
    pair = tl.load(PAIR_OF_ROW + source)
    weight = tl.load(WEIGHTS + pair).to(tl.float32)
    grad_weight = tl.zeros((HEIGHT,), tl.float32)
    DTYPE: tl.constexpr = OUT.dtype.element_ty
    for first in range(0, COLUMNS, WIDTH):
        column = first + tl.arange(0, WIDTH)
        is_column = column < COLUMNS
        gate, up = load_gate_inputs(X, row, is_row, first, COLUMNS, HEIGHT, WIDTH, INTERLEAVED)
        place = GRAD + source[:, None].to(tl.int64) * COLUMNS + column[None, :]
        grad = tl.load(place, mask=is_column[None, :], other=0.0).to(tl.float32)
        value, by_gate, by_up = gate_derivatives(gate, up, limit, alpha, KIND)
        grad_weight += tl.sum(value * grad, 1)
        if KEEPS_VALUE:
            tl.store(place, value.to(DTYPE), mask=is_row[:, None] & is_column[None, :])
        grad *= weight[:, None]
        by_gate = (by_gate * grad).to(DTYPE)
        by_up = (by_up * grad).to(DTYPE)
        store_gate_inputs(OUT, row, is_row, first, by_gate, by_up, COLUMNS, HEIGHT, WIDTH, INTERLEAVED)
    if HAS_ROW_TERM:
        grad_weight += tl.load(ROW_TERM + source).to(tl.float32)
    # rows without an expert are uninitialized
    grad_weight = tl.where(is_here, grad_weight, 0.0)
    tl.store(GRAD_WEIGHTS + pair, grad_weight.to(GRAD_WEIGHTS.dtype.element_ty), mask=is_row)


def gate_backward(
    x: torch.Tensor,
    grad: torch.Tensor,
    weights: torch.Tensor,
    gate: Gate,
    rows: RoutedRows,
    row_term: torch.Tensor | None = None,
    keeps_value: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the gate's input and of the routing weights.

    Args:
        x: `(S, 2I)`, input of the gate.
        grad: `(S, I)`, gradient of the gated rows for routing weights of 1.
        weights: `(T, K)` routing weights, contiguous.
        gate: the gate.
        rows: the routing.
        row_term: `(S,)`, added to the gradient of each row's weight.
        keeps_value: overwrite `grad` with the gated rows, which are computed anyway.

    Returns:
        `(S, 2I)` gradient of x, and `(T, K)` `sum(gated * grad)` in the dtype of the weights, 0 for pairs that are not
        computed here.
    """
    num_rows, columns = x.shape[0], x.shape[1] // 2
    out = allocate(x.shape, x.dtype, x.device)
    grad_weights = allocate(weights.shape, weights.dtype, weights.device)
    width = min(256, next_power_of_2(columns))
    height = max(1, 256 // width)
    launch(
        _gate_backward_kernel,
        (cdiv(num_rows, height),),
        (
            x,
            grad,
            weights,
            rows.pair_of_row,
            grad if row_term is None else row_term,
            rows.ends,
            out,
            grad_weights,
        ),
        (num_rows, gate.limit, gate.alpha),
        num_warps=2,
        COLUMNS=columns,
        KIND=gate.kind,
        INTERLEAVED=gate.interleaved,
        HAS_ROW_TERM=row_term is not None,
        KEEPS_VALUE=keeps_value,
        NUM_EXPERTS=rows.ends.shape[0],
        HEIGHT=height,
        WIDTH=width,
    )
    return out, grad_weights
