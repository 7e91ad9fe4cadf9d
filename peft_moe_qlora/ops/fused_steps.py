"""Forward and backward of the whole experts layer, composed from the kernels.

Saved for the backward: the hidden states, the routing, the gate's input and the rank-r activations. Letters as in the
package's docstring. With `G` the gradient of the output, gathered to rows but not yet weighted,

    D = G W_down + scaling (G B_down) A_down      gradient of the gated rows h if all routing weights were 1
    d weight = <D, h> + <G, bias_down>            so the down projection's output is not saved
    d gate_up = gate'(gate_up) * weight * D

and the gradients of the factors are products over the rows of each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .kernels.combine import combine
from .kernels.gate import apply_gate, gate_backward
from .kernels.gate_low_rank import fits_one_pass, gate_backward_with_factors
from .kernels.gemm_operands import LowRankTerm, Rows
from .kernels.gemv import combined_pairs, fits_gemv, gated_pairs, reduce_pairs
from .kernels.grouped_gemm import grouped_gemm
from .kernels.launch import device_of
from .kernels.launch_recorder import allocate
from .kernels.low_rank import factor_gradient, reduce_rows
from .kernels.runs import rows_of_a_run
from .kernels.schedule import Cut, RoutedRows, Tiles, cut_tiles, route
from .kernels.specialized_support import supports_specialized
from .kernels.tuning import GemmTiles, choose_tiles, most_pairs_without_sorting
from .operands import Factors, Gate, PackedWeight


def _tuned(weight: PackedWeight, for_input_gradient: bool, rank: int, num_pairs: int, dtype: torch.dtype) -> GemmTiles:
    along_columns = weight.contracts_columns(for_input_gradient)
    rows_per_expert = num_pairs / weight.num_experts
    codes = weight.storage.kernel_codes if weight.tile_block is not None else None
    n, k = (weight.rows, weight.columns) if along_columns else (weight.columns, weight.rows)
    device = weight.tensors[0].device
    may_specialize = supports_specialized(device, dtype, codes, n, k, rank)
    return choose_tiles(device, dtype, codes, along_columns, rows_per_expert, n, k, may_specialize)


class Plan(NamedTuple):
    """Tiles of one product."""

    tuned: GemmTiles
    tiles: Tiles


class Planner:
    """Chooses the tiles of each product, and divides the rows into tiles once per `Cut`."""

    def __init__(self, rows: RoutedRows, dtype: torch.dtype, tiles: Sequence[Tiles] = ()) -> None:
        self.rows = rows
        self.dtype = dtype
        self.tiles = {one.cut: one for one in tiles}

    def plan(self, weight: PackedWeight, for_input_gradient: bool, rank: int) -> Plan:
        """Tiles of a product with a low-rank term of a rank, or without one, of rank 0."""
        tuned = _tuned(weight, for_input_gradient, rank, self.rows.pair_of_row.shape[0], self.dtype)
        return Plan(tuned, self._cut(tuned.cut))

    def runs(self, columns: int, rank: int) -> Tiles | None:
        """Runs of rows for split factor gradients; None if each expert is summed in one pass."""
        length = rows_of_a_run(self.rows.pair_of_row.shape[0], self.rows.ends.shape[0], columns, rank)
        if length is None:
            return None
        return self._cut(Cut((length,)))

    def _cut(self, cut: Cut) -> Tiles:
        if cut not in self.tiles:
            self.tiles[cut] = cut_tiles(self.rows, cut)
        return self.tiles[cut]


def _product(
    planner: Planner,
    rows: Rows,
    weight: PackedWeight,
    for_input_gradient: bool,
    low_rank: LowRankTerm | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    plan = planner.plan(weight, for_input_gradient, 0 if low_rank is None else low_rank.reduced.shape[1])
    return grouped_gemm(
        rows, weight, for_input_gradient, planner.rows.ends, plan.tiles, plan.tuned, low_rank=low_rank, bias=bias
    )


class Saved(NamedTuple):
    """Tensors that the forward saves for the backward, besides its inputs."""

    gate_input: torch.Tensor
    up_reduced: torch.Tensor | None
    down_reduced: torch.Tensor | None
    planner: Planner


def _check(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *projections: tuple[PackedWeight, Factors | None, torch.Tensor | None],
) -> None:
    """Checks the shapes: kernels get only addresses, so mismatched shapes would cause out-of-bounds reads."""
    num_tokens, device = hidden_states.shape[0], hidden_states.device
    shapes = [
        ("top_k_weights", top_k_weights, top_k_index.shape),
        ("top_k_index", top_k_index, (num_tokens, top_k_index.shape[1])),
    ]
    features = []
    for weight, factors, bias in projections:
        features.append((weight.in_features, weight.out_features))
        shapes.append(("weight", weight.tensors[0], weight.tensors[0].shape))
        if factors is not None:
            rank = factors.A.shape[1]
            if rank == 0:
                raise ValueError("Factors of rank 0 are not supported. Pass None instead.")
            shapes.append(("factor A", factors.A, (weight.num_experts, rank, weight.in_features)))
            shapes.append(("factor B", factors.B, (weight.num_experts, weight.out_features, rank)))
        if bias is not None:
            shapes.append(("bias", bias, (weight.num_experts, weight.out_features)))
    (hidden, up_features), (gated, out_features) = features
    shapes.append(("hidden_states", hidden_states, (num_tokens, hidden)))
    if up_features != 2 * gated or out_features != hidden:
        raise ValueError(
            f"The projections have (in, out) features {features}. Expected those of gated experts: (H, 2 I), (I, H)."
        )
    for name, tensor, expected in shapes:
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}. Expected {tuple(expected)}.")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}. Expected {device}, the device of the hidden states.")


def experts_forward(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: PackedWeight,
    down: PackedWeight,
    up_factors: Factors | None,
    down_factors: Factors | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: Gate,
    needs_output: bool = True,
) -> tuple[torch.Tensor, Saved]:
    """`(T, H)` -> `(T, H)`, with T > 0; all tensors except the factors must be contiguous.

    Without `needs_output`, only tensors for the backward are computed, and the output is uninitialized.
    """
    _check(hidden_states, top_k_index, top_k_weights, (up, up_factors, up_bias), (down, down_factors, down_bias))
    num_tokens, top_k = top_k_index.shape
    cut = _tuned(up, False, _rank(up_factors), top_k_index.numel(), hidden_states.dtype).cut
    rows, tiles = route(top_k_index, up.num_experts, cut)
    planner = Planner(rows, hidden_states.dtype, [tiles])
    tokens = Rows(hidden_states, rows.pair_of_row, top_k)

    term = None
    if up_factors is not None:
        A, B, scaling = up_factors
        lora_x = reduce_rows(tokens, A.transpose(1, 2), scaling, rows.ends, planner.plan(up, False, A.shape[1]).tiles)
        term = LowRankTerm(lora_x, B)
    gate_input = _product(planner, tokens, up, False, term, up_bias)

    gated = apply_gate(gate_input, gate)
    down_term = None
    if down_factors is not None:
        A, B, scaling = down_factors
        lora_x = reduce_rows(
            Rows(gated), A.transpose(1, 2), scaling, rows.ends, planner.plan(down, False, A.shape[1]).tiles
        )
        down_term = LowRankTerm(lora_x, B)
    if not needs_output:
        return _like(hidden_states), Saved(gate_input, _reduced(term), _reduced(down_term), planner)
    down_rows = _product(planner, Rows(gated), down, False, down_term, down_bias)
    del gated
    out = combine(down_rows, top_k_weights, rows, num_tokens, top_k, hidden_states.dtype)
    return out, Saved(gate_input, _reduced(term), _reduced(down_term), planner)


def goes_by_gemv(
    num_pairs: int,
    dtype: torch.dtype,
    up: PackedWeight,
    down: PackedWeight,
    up_factors: Factors | None,
    down_factors: Factors | None,
) -> bool:
    """Whether `experts_forward_gemv` supports this forward and is faster."""
    return (
        num_pairs <= most_pairs_without_sorting(up.tensors[0].device, dtype)
        and all(pair.A.is_contiguous() and pair.B.is_contiguous() for pair in (up_factors, down_factors) if pair)
        and fits_gemv(up, down)
    )


def experts_forward_gemv(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: PackedWeight,
    down: PackedWeight,
    up_factors: Factors | None,
    down_factors: Factors | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: Gate,
) -> torch.Tensor:
    """`experts_forward` for few tokens without a backward; the factors must be contiguous, too."""
    _check(hidden_states, top_k_index, top_k_weights, (up, up_factors, up_bias), (down, down_factors, down_bias))
    lora_x = B = None
    if up_factors is not None:
        A, B, scaling = up_factors
        lora_x = reduce_pairs(hidden_states, top_k_index, A, scaling, top_k_index.shape[1])
    gated = gated_pairs(hidden_states, top_k_index, up, lora_x, B, up_bias, gate)
    lora_x = B = None
    if down_factors is not None:
        A, B, scaling = down_factors
        lora_x = reduce_pairs(gated, top_k_index, A, scaling, 1)
    return combined_pairs(gated, top_k_index, top_k_weights, down, lora_x, B, down_bias)


def _rank(factors: Factors | None) -> int:
    return 0 if factors is None else factors.A.shape[1]


def _reduced(term: LowRankTerm | None) -> torch.Tensor | None:
    return None if term is None else term.reduced


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return allocate(tensor.shape, tensor.dtype, tensor.device)


class Gradients(NamedTuple):
    hidden_states: torch.Tensor | None
    top_k_weights: torch.Tensor
    up_A: torch.Tensor | None
    up_B: torch.Tensor | None
    down_A: torch.Tensor | None
    down_B: torch.Tensor | None


class GateGradients(NamedTuple):
    """Gradients of the gate's input and of the routing weights, and low-rank products of the former and of gated rows.

    Args:
        gate_input: `(S, 2I)`.
        top_k_weights: `(T, K)`.
        up_reduced: `(S, R)`, the gradient of the gate's input times the factor B of the first projection, scaled.
        down_A: gradient of the factor A of the second projection.
        up_B: gradient of the factor B of the first projection.
    """

    gate_input: torch.Tensor
    top_k_weights: torch.Tensor
    up_reduced: torch.Tensor | None
    down_A: torch.Tensor | None
    up_B: torch.Tensor | None


def _through_gate(
    saved: Saved,
    grad_gated: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate: Gate,
    bias_term: torch.Tensor | None,
    up: PackedWeight,
    up_factors: Factors | None,
    down_factors: Factors | None,
    down_reduced: torch.Tensor | None,
    needs_factors: bool,
) -> GateGradients:
    """May overwrite `grad_gated (S, I)`, the gradient of the gated rows for routing weights of 1."""
    planner = saved.planner
    rows = planner.rows
    needs_down, needs_up = (factors is not None and needs_factors for factors in (down_factors, up_factors))
    if needs_down and needs_up and fits_one_pass(saved.gate_input, down_factors.A.shape[1], up_factors.A.shape[1]):
        down_A, up_B = _like(down_factors.A), _like(up_factors.B)
        # up_B has two features for each column of down_A
        runs = planner.runs(down_A.shape[2], down_A.shape[1] + 2 * up_B.shape[2])
        grad, grad_weights, up_reduced = gate_backward_with_factors(
            saved.gate_input,
            grad_gated,
            top_k_weights,
            gate,
            rows,
            bias_term,
            down_reduced,
            saved.up_reduced,
            up_factors.B,
            up_factors.scaling,
            down_A.transpose(1, 2),
            up_B,
            runs,
        )
        return GateGradients(grad, grad_weights, up_reduced, down_A, up_B)
    grad, grad_weights = gate_backward(
        saved.gate_input, grad_gated, top_k_weights, gate, rows, bias_term, keeps_value=needs_down
    )
    gated = grad_gated  # with `keeps_value`, overwritten in place by the gated rows
    up_reduced = down_A = up_B = None
    if needs_down:
        down_A = _like(down_factors.A)
        factor_gradient(
            Rows(gated),
            down_reduced,
            rows.ends,
            down_A.transpose(1, 2),
            weights=top_k_weights,
            pair_of_row=rows.pair_of_row,
            runs=planner.runs(*down_A.shape[:0:-1]),
        )
    if up_factors is not None:
        tiles = planner.plan(up, True, _rank(up_factors)).tiles
        up_reduced = reduce_rows(Rows(grad), up_factors.B, up_factors.scaling, rows.ends, tiles)
    if needs_up:
        up_B = _like(up_factors.B)
        factor_gradient(Rows(grad), saved.up_reduced, rows.ends, up_B, runs=planner.runs(*up_B.shape[1:]))
    return GateGradients(grad, grad_weights, up_reduced, down_A, up_B)


def experts_backward(
    grad_out: torch.Tensor,
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor,
    saved: Saved,
    up: PackedWeight,
    down: PackedWeight,
    up_factors: Factors | None,
    down_factors: Factors | None,
    down_bias: torch.Tensor | None,
    gate: Gate,
    needs_hidden_states: bool = True,
    needs_factors: bool = True,
) -> Gradients:
    """Gradients of all inputs that are not frozen; `grad_out (T, H)` must be contiguous."""
    num_tokens, top_k = top_k_weights.shape
    planner = saved.planner
    rows = planner.rows
    grad_tokens = Rows(grad_out, rows.pair_of_row, top_k)

    term = None
    if down_factors is not None:
        A, B, scaling = down_factors
        reduced = reduce_rows(grad_tokens, B, scaling, rows.ends, planner.plan(down, True, _rank(down_factors)).tiles)
        term = LowRankTerm(reduced, A.transpose(1, 2))
    grad_gated = _product(planner, grad_tokens, down, True, term)
    bias_term = None
    if down_bias is not None:
        bias_term = reduce_rows(
            grad_tokens, down_bias[:, :, None], 1.0, rows.ends, planner.plan(down, True, _rank(down_factors)).tiles
        )
    grad_gate_input, grad_weights, up_reduced, down_A, up_B = _through_gate(
        saved,
        grad_gated,
        top_k_weights,
        gate,
        bias_term,
        up,
        up_factors,
        down_factors,
        _reduced(term),
        needs_factors,
    )
    del grad_gated

    up_A = down_B = None
    if down_factors is not None and needs_factors:
        down_B = _like(down_factors.B)
        runs = planner.runs(*down_B.shape[1:])
        factor_gradient(grad_tokens, saved.down_reduced, rows.ends, down_B, weights=top_k_weights, runs=runs)
    up_term = None
    if up_factors is not None:
        up_term = LowRankTerm(up_reduced, up_factors.A.transpose(1, 2))
        if needs_factors:
            up_A = _like(up_factors.A)
            tokens = Rows(hidden_states, rows.pair_of_row, top_k)
            runs = planner.runs(*up_A.shape[:0:-1])
            factor_gradient(tokens, up_reduced, rows.ends, up_A.transpose(1, 2), runs=runs)
    if not needs_hidden_states:
        return Gradients(None, grad_weights, up_A, up_B, down_A, down_B)
    grad_rows = _product(planner, Rows(grad_gate_input), up, True, up_term)
    grad_hidden_states = combine(grad_rows, None, rows, num_tokens, top_k, hidden_states.dtype)
    return Gradients(grad_hidden_states, grad_weights, up_A, up_B, down_A, down_B)


def frozen_product(
    rows: torch.Tensor, weight: PackedWeight, ends: torch.Tensor, for_input_gradient: bool
) -> torch.Tensor:
    """Rows sorted by expert times the frozen matrices or their transposes; zero for rows without an expert.

    Args:
        rows: `(S, features)`.
        weight: the matrices.
        ends: `(E,)` int32.
        for_input_gradient: as in `grouped_gemm`.
    """
    with device_of(rows):
        index = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        planner = Planner(RoutedRows(ends, index, index), rows.dtype)
        out = _product(planner, Rows(rows.contiguous()), weight, for_input_gradient, None)
        return out.masked_fill_((index >= ends[-1])[:, None], 0)
