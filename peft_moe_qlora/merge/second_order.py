"""Quantizing merged weights with minimal error of the layer's output, rather than of the weights.

Rounding each weight to the nearest value of its block is optimal for isotropic inputs. Inputs of experts are not
isotropic. With their second moment `H = E[x x^T]`, the output error of a row `w` is `(q - w) H (q - w)^T`. Columns are
rounded one after the other, and the error of each is compensated by the remaining columns (GPTQ: Frantar et al. 2022,
arXiv:2210.17323, section 3). Scales are chosen before, for each block the best of a few candidates.

The base weights are already on the grid. If a delta is small compared to the grid's steps, nearest rounding of a row
may have a smaller error than GPTQ. Therefore each row starts from the better of the two results, and then its columns
are visited again: each gets the best code given all others (coordinate descent).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..quantization import Fidelity, Format, QuantizedStack, choose_scales

_COLUMNS_AT_A_TIME = 128
_VISITS = 2
"""Visits of each column after the first rounding; more visits gained little."""
_NAMED = 20

SHARE_OF_ALL = 0.02
"""Weight of the second moment over all experts relative to an expert's own, which may be based on few tokens."""
SHARE_OF_DELTA = 1.0
"""Weight of the directions that the adapter's A reads, relative to the mean over all directions."""
DAMPING = 0.01
"""Value added to the diagonal, relative to the mean over all directions."""


@dataclass(frozen=True)
class MergedExpert:
    """The exact merged weights of one expert, and the statistics for rounding them.

    Args:
        weight: `(out, in)` fp32, the exact merged matrix.
        moment: `(in, in)` fp32, mean of `x x^T` over the tokens routed to the expert; zeros if there are none. The
            inputs may be scaled by any factor that is the same for all experts.
        core: `(r, in)` fp32 with `core^T core = delta^T delta`.
    """

    weight: torch.Tensor
    moment: torch.Tensor
    core: torch.Tensor


@torch.no_grad()
def quantize_second_order(
    stack: QuantizedStack, merged: Callable[[int], MergedExpert], moment_of_all: torch.Tensor
) -> QuantizedStack:
    """Creates a stack in the same storage with the merged weights of each expert.

    The codes and scales of experts without a delta are copied.

    Args:
        stack: the stack before the merge; its scales are among the candidates.
        merged: returns the merged weights of an expert.
        moment_of_all: `(in, in)` fp32, mean of `x x^T` over all experts' tokens.

    Returns:
        The stack; its `merge_notes` name experts whose moments are unusable, which are rounded to the nearest value.

    Raises:
        ValueError: a merged weight is not finite.
    """
    result = stack.like_this()
    size = stack.in_features * (8 * stack.out_features + 10 * stack.in_features) * 4
    step = max(1, _batch_bytes(stack.device) // size)
    fidelity = Fidelity()
    nearest = []
    for start in range(0, stack.num_experts, step):
        found = {}
        for expert in range(start, min(start + step, stack.num_experts)):
            one, before = merged(expert), stack.decode_expert(expert, torch.float32)
            if torch.equal(one.weight, before.T if stack.is_transposed else before):
                result.set_tensors(expert, {name: of[0] for name, of in stack.tensors_of(_only(expert)).items()})
                fidelity.add(before, before, before)
            else:
                found[expert] = one
        nearest += _round(stack, result, found, moment_of_all)
        for expert, one in found.items():
            exact = one.weight.T if stack.is_transposed else one.weight
            before = stack.decode_expert(expert, torch.float32)
            fidelity.add(before, exact, result.decode_expert(expert, torch.float32))
    result.fidelity = fidelity
    if nearest:
        result.merge_notes = (
            "the Cholesky factorization of the inputs' second moments failed; "
            f"{_of_experts(nearest)} were rounded to the nearest value",
        )
    return result


def _round(
    stack: QuantizedStack, result: QuantizedStack, found: dict[int, MergedExpert], moment_of_all: torch.Tensor
) -> list[int]:
    """Stores merged experts in `result` and returns those that are rounded to the nearest value."""
    if not found:
        return []
    scales = []
    for expert, one in found.items():
        stored = one.weight.T if stack.is_transposed else one.weight
        before = {name: of[0] for name, of in stack.tensors_of(_only(expert)).items()}
        scales_before = stack.scales(_only(expert))[0]
        result.set_scales(expert, choose_scales(stored, scales_before, stack.storage, stack.parts), before)
        of_weights = result.scale_of_weights(expert)
        scales.append(of_weights.T if stack.is_transposed else of_weights)
    hessians = torch.stack([_hessian(one, moment_of_all) for one in found.values()])
    weights = torch.stack([one.weight for one in found.values()])
    codes, is_nearest = round_second_order(weights, torch.stack(scales), hessians, stack.storage)
    for expert, of_expert in zip(found, codes):
        result.set_codes(expert, of_expert.T if stack.is_transposed else of_expert)
    return [expert for expert, is_one in zip(found, is_nearest.tolist()) if is_one]


def _only(expert: int) -> slice:
    return slice(expert, expert + 1)


def _of_experts(ids: list[int]) -> str:
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return f"experts {', '.join(map(str, ids[:_NAMED]))}{more}"


def _batch_bytes(device: torch.device) -> int:
    """Memory limit for a batch of experts; on a GPU the columns of a single expert are too little work."""
    if device.type != "cuda":
        return 2**29
    return min(2**33, torch.cuda.mem_get_info(device)[0] // 4)


def _hessian(merged: MergedExpert, moment_of_all: torch.Tensor) -> torch.Tensor:
    """The cost matrix of errors, `(in, in)`, relative to the mean over all directions."""
    moment = merged.moment + SHARE_OF_ALL * moment_of_all
    unit = moment.diagonal().mean()
    # without tokens all directions have the same weight
    moment = moment / (unit if unit != 0 else 1)
    largest = torch.linalg.matrix_norm(merged.core, 2) if len(merged.core) else merged.core.new_zeros(())
    if largest > 0:
        core = merged.core / largest
        moment = moment + SHARE_OF_DELTA * (core.T @ core)
    moment.diagonal().add_(DAMPING if unit != 0 else 1.0)
    return moment


def round_second_order(
    weights: torch.Tensor, scales: torch.Tensor, hessians: torch.Tensor, storage: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of several matrices, whose columns are rounded one after the other.

    Args:
        weights: `(E, out, in)` fp32.
        scales: `(E, out, in)` fp32, of each weight.
        hessians: `(E, in, in)` fp32, positive definite.
        storage: the format.

    Returns:
        `(E, out, in)` uint8; and `(E,)` bool: whether a Hessian is not positive definite, or not finite. Such a matrix
        is rounded to the nearest value.
    """
    # the costliest columns first, while many columns remain to compensate their errors
    order = hessians.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    of_columns = order[:, None].expand_as(weights)
    weights, scales = weights.gather(2, of_columns), scales.gather(2, of_columns)
    hessians = hessians.gather(1, order[:, :, None].expand_as(hessians))
    hessians = hessians.gather(2, order[:, None].expand_as(hessians))
    spread, is_nearest = _inverse_factor(hessians)
    nearest = storage.nearest(weights, scales)
    in_turn = _round_in_turn(weights.clone(), scales, spread, storage)
    is_better = _costs(in_turn, weights, scales, hessians, storage) < _costs(
        nearest, weights, scales, hessians, storage
    )
    codes = torch.where(is_better[:, :, None], in_turn, nearest)
    codes = _visit_again(codes, weights, scales, hessians, storage)
    codes = torch.where(is_nearest[:, None, None], nearest, codes)
    return torch.empty_like(codes).scatter_(2, of_columns, codes), is_nearest


def _round_in_turn(weights: torch.Tensor, scales: torch.Tensor, spread: torch.Tensor, storage: Format) -> torch.Tensor:
    """Codes; modifies the weights in place. `spread` is the result of `_inverse_factor`."""
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    for start, stop in _runs(weights.shape[2]):
        errors = torch.empty_like(weights[:, :, start:stop])
        for column in range(start, stop):
            weight, scale = weights[:, :, column], scales[:, :, column]
            code = storage.nearest(weight, scale)
            codes[:, :, column] = code
            error = (weight - storage.values(code) * scale) / spread[:, column, column, None]
            errors[:, :, column - start] = error
            weights[:, :, column:stop] -= error[:, :, None] * spread[:, column, None, column:stop]
        weights[:, :, stop:] -= errors @ spread[:, start:stop, stop:]
    return codes


def _costs(
    codes: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, hessians: torch.Tensor, storage: Format
) -> torch.Tensor:
    """`(E, out)`: the cost of each row's errors."""
    errors = storage.values(codes) * scales - weights
    return (errors @ hessians * errors).sum(dim=2)


def _visit_again(
    codes: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, hessians: torch.Tensor, storage: Format
) -> torch.Tensor:
    """Improves codes by coordinate descent: each column gets the best code given all others; costs never increase."""
    codes, values = codes.clone(), storage.values(codes) * scales
    costs = hessians.diagonal(dim1=1, dim2=2)
    for _ in range(_VISITS):
        gradient = (values - weights) @ hessians
        for start, stop in _runs(weights.shape[2]):
            changes = torch.empty_like(weights[:, :, start:stop])
            for column in range(start, stop):
                scale, before = scales[:, :, column], values[:, :, column]
                code = storage.nearest(before - gradient[:, :, column] / costs[:, column, None], scale)
                change = storage.values(code) * scale - before
                codes[:, :, column], changes[:, :, column - start] = code, change
                gradient[:, :, column:stop] += change[:, :, None] * hessians[:, column, None, column:stop]
            values[:, :, start:stop] += changes
            gradient[:, :, stop:] += changes @ hessians[:, start:stop, stop:]
    return codes


def _runs(columns: int) -> list[tuple[int, int]]:
    """Ranges of columns that are processed together; updates of the remaining columns are applied once per range."""
    return [(start, min(start + _COLUMNS_AT_A_TIME, columns)) for start in range(0, columns, _COLUMNS_AT_A_TIME)]


def _inverse_factor(hessians: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper triangular `U` with `U^T U = H^-1`, `(E, in, in)`: row k has the updates of later columns for column k.

    If `H` has no such factor, `U` is the identity, which results in no updates. The `(E,)` bool tensor marks these.
    """
    # the lower Cholesky factor of H with reversed rows and columns becomes upper after reversing it back
    factor, info = torch.linalg.cholesky_ex(hessians.double().flip(1, 2))
    factor = factor.flip(1, 2)
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    has_none = (info != 0) | ~factor.isfinite().all(dim=2).all(dim=1)
    factor[has_none] = identity
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True).float(), has_none
