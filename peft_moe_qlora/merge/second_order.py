"""Quantizing merged weights so that what the layer gives changes least, rather than the weights.

Rounding each weight to the nearest value of its block is best where inputs are alike in every direction. Inputs of
experts are not. With their second moment `H = E[x x^T]`, the error of a row `w` is `(q - w) H (q - w)^T`, and columns
are rounded one after the other, each error being made up for by the columns that are still to come (GPTQ: Frantar et
al. 2022, arXiv:2210.17323, section 3). Scales are chosen before, for each block the best of a few.

What is merged onto lies on the grid already, and a delta that is small beside the grid's steps may be lost less by
leaving a row as it is than by rounding it in turn. So each row starts from the better of the two, and then its columns
are visited again, each getting the code that is best while the others stay (coordinate descent).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..quantization import Fidelity, Format, QuantizedStack, choose_scales

_COLUMNS_AT_A_TIME = 128
_VISITS = 2
"""Of each column after the first rounding; more gained little."""
_NAMED = 20

SHARE_OF_ALL = 0.02
"""How much the second moment over all experts counts beside an expert's own, which may come from few tokens."""
SHARE_OF_DELTA = 1.0
"""How much the directions that the adapter reads count, in units of the mean over all directions."""
DAMPING = 0.01
"""What is added to the diagonal, in the same units."""


@dataclass(frozen=True)
class MergedExpert:
    """What a stack is to hold of one expert.

    Args:
        weight: `(out, in)` fp32, the exact merged matrix.
        moment: `(in, in)` fp32, mean of `x x^T` over the tokens that the expert has seen; zeros if it saw none. The
            inputs may be in any unit that all experts share.
        core: `(r, in)` fp32 with `core^T core = delta^T delta`.
    """

    weight: torch.Tensor
    moment: torch.Tensor
    core: torch.Tensor


@torch.no_grad()
def quantize_second_order(
    stack: QuantizedStack, merged: Callable[[int], MergedExpert], moment_of_all: torch.Tensor
) -> QuantizedStack:
    """A new stack in the storage of another, with the merged weights of each expert.

    What is stored of an expert without a delta is copied.

    Args:
        stack: of before the merge; its scales are among those tried.
        merged: gives what an expert is to hold.
        moment_of_all: `(in, in)` fp32, mean of `x x^T` over all experts' tokens.

    Returns:
        The stack; its `merge_notes` name experts whose moments were of no use, which are rounded to the nearest.

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
            f"the second moments of the inputs can't be factorized, so that {_of_experts(nearest)} are rounded to the "
            "nearest",
        )
    return result


def _round(
    stack: QuantizedStack, result: QuantizedStack, found: dict[int, MergedExpert], moment_of_all: torch.Tensor
) -> list[int]:
    """Stores some merged experts in `result`; gives those that are rounded to the nearest."""
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
    """What several experts at a time may take; on a GPU one expert's columns are too little work."""
    if device.type != "cuda":
        return 2**29
    return min(2**33, torch.cuda.mem_get_info(device)[0] // 4)


def _hessian(merged: MergedExpert, moment_of_all: torch.Tensor) -> torch.Tensor:
    """What an error costs, `(in, in)`, in units of its mean over all directions."""
    moment = merged.moment + SHARE_OF_ALL * moment_of_all
    unit = moment.diagonal().mean()
    # no token, no input: every direction counts alike
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
    """Codes of several matrices, their columns rounded in turn.

    Args:
        weights: `(E, out, in)` fp32.
        scales: `(E, out, in)` fp32, of each weight.
        hessians: `(E, in, in)` fp32, positive definite.
        storage: the format.

    Returns:
        `(E, out, in)` uint8; and `(E,)` bool: whether a Hessian is not positive definite, or not finite. Such a matrix
        is rounded to the nearest.
    """
    # the costliest columns first, while there are many left to make up for their errors
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
    """Codes; the weights are changed. `spread` is that of `_inverse_factor`."""
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
    """`(E, out)`: what the errors of each row cost."""
    errors = storage.values(codes) * scales - weights
    return (errors @ hessians * errors).sum(dim=2)


def _visit_again(
    codes: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, hessians: torch.Tensor, storage: Format
) -> torch.Tensor:
    """Codes, none of which costs more than before: one column after the other gets its best, the others given."""
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
    """Columns that are worked on together: what they ask of the others is added once for all."""
    return [(start, min(start + _COLUMNS_AT_A_TIME, columns)) for start in range(0, columns, _COLUMNS_AT_A_TIME)]


def _inverse_factor(hessians: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper triangular `U` with `U^T U = H^-1`, `(E, in, in)`: in row k, what column k's error asks of later ones.

    Where `H` has no such factor, `U` is the identity, by which errors ask nothing of other columns. `(E,)` bool says
    where.
    """
    # of H with rows and columns in reverse order the Cholesky factor is lower, of H itself then upper
    factor, info = torch.linalg.cholesky_ex(hessians.double().flip(1, 2))
    factor = factor.flip(1, 2)
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    has_none = (info != 0) | ~factor.isfinite().all(dim=2).all(dim=1)
    factor[has_none] = identity
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True).float(), has_none
