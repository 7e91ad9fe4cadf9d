"""Quantizing merged weights so that what the layer gives changes least, rather than the weights.

Rounding each weight to the nearest value of its block is best where inputs are alike in every direction. Inputs of
experts are not. With their second moment `H = E[x x^T]`, the error of a row `w` is `(q - w) H (q - w)^T`, and columns
are rounded one after the other, each error being made up for by the columns that are still to come (GPTQ: Frantar et
al. 2022, arXiv:2210.17323, section 3). Scales are chosen before, for each block the best of a few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..quantization.fidelity import Fidelity
from ..quantization.four_bit import FourBitFormat, code_values
from ..quantization.stack import QuantizedStack

# of a block's largest magnitude; a smaller scale clips the largest weight and is finer for the others
_SCALE_FACTORS = (1.0, 0.95, 0.9, 0.85)
_COLUMNS_AT_A_TIME = 128
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

    Args:
        stack: of before the merge; its scales are among those tried.
        merged: gives what an expert is to hold.
        moment_of_all: `(in, in)` fp32, mean of `x x^T` over all experts' tokens.

    Returns:
        The stack; its `merge_notes` name experts whose moments were of no use, which are rounded to the nearest.

    Raises:
        ValueError: a merged weight is not finite.
    """
    result = QuantizedStack(stack.shape, stack.dtype, stack.is_transposed, stack.storage, stack.device)
    size = stack.in_features * (4 * stack.out_features + 10 * stack.in_features) * 4
    step = max(1, _batch_bytes(stack.device) // size)
    fidelity = Fidelity()
    nearest = []
    for start in range(0, stack.num_experts, step):
        experts = range(start, min(start + step, stack.num_experts))
        found = [merged(expert) for expert in experts]
        scales = []
        for expert, one in zip(experts, found):
            stored = one.weight.T if stack.is_transposed else one.weight
            absmax = choose_scales(stored, stack.scales(slice(expert, expert + 1))[0], stack.storage)
            result.set_scales(expert, absmax)
            scales.append(_scale_of_weights(result.scales(slice(expert, expert + 1))[0], stored, stack))
        hessians = torch.stack([_hessian(one, moment_of_all) for one in found])
        weights = torch.stack([one.weight for one in found])
        codes, is_nearest = round_second_order(weights, torch.stack(scales), hessians, stack.storage)
        nearest += [expert for expert, is_one in zip(experts, is_nearest.tolist()) if is_one]
        for expert, one, of_expert in zip(experts, found, codes):
            result.set_codes(expert, of_expert.T if stack.is_transposed else of_expert)
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


def choose_scales(matrix: torch.Tensor, before: torch.Tensor, storage: FourBitFormat) -> torch.Tensor:
    """`(num_blocks,)` fp32 scales of a `(rows, columns)` matrix: of a few, those of least squared error.

    Args:
        matrix: as stored.
        before: scales to be tried too; if a delta is small, most codes are still right with them.
        storage: the format.

    Raises:
        ValueError: a weight is not finite.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError("NaNs detected in the merged weights, or values out of range.")
    blocks = _blocks(matrix, storage)
    largest = blocks.abs().amax(dim=1)
    best = torch.full_like(largest, torch.inf)
    chosen = largest.clone()
    for candidate in (*(largest * factor for factor in _SCALE_FACTORS), before):
        scale = candidate[:, None]
        error = (_values(nearest_codes(blocks, scale, storage), storage) * scale - blocks).square().sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, candidate, chosen)
    return chosen


def round_second_order(
    weights: torch.Tensor, scales: torch.Tensor, hessians: torch.Tensor, storage: FourBitFormat
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
    spread, is_nearest = _inverse_factor(hessians.gather(2, order[:, None].expand_as(hessians)))
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    columns = weights.shape[2]
    for start in range(0, columns, _COLUMNS_AT_A_TIME):
        stop = min(start + _COLUMNS_AT_A_TIME, columns)
        errors = torch.empty_like(weights[:, :, start:stop])
        for column in range(start, stop):
            weight, scale = weights[:, :, column], scales[:, :, column]
            code = nearest_codes(weight, scale, storage)
            codes[:, :, column] = code
            error = (weight - _values(code, storage) * scale) / spread[:, column, column, None]
            errors[:, :, column - start] = error
            weights[:, :, column:stop] -= error[:, :, None] * spread[:, column, None, column:stop]
        weights[:, :, stop:] -= errors @ spread[:, start:stop, stop:]
    return torch.empty_like(codes).scatter_(2, of_columns, codes), is_nearest


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


def nearest_codes(weights: torch.Tensor, scales: torch.Tensor, storage: FourBitFormat) -> torch.Tensor:
    """The codes whose values, times the scales, are nearest; uint8. Any sign of a scale will do, and 0.

    A scale that is rounded to 8 bits around the mean of all can come out negative.
    """
    table, order = code_values(storage.quant_type, weights.device).sort()
    middles = (table[1:] + table[:-1]) / 2
    ratios = torch.where(scales == 0, 0, weights / scales).contiguous()
    return order.to(torch.uint8)[torch.bucketize(ratios, middles)]


def _values(codes: torch.Tensor, storage: FourBitFormat) -> torch.Tensor:
    return code_values(storage.quant_type, codes.device)[codes.int()]


def _blocks(matrix: torch.Tensor, storage: FourBitFormat) -> torch.Tensor:
    """`(num_blocks, blocksize)`, the last block filled up with zeros."""
    flat = matrix.flatten()
    missing = -len(flat) % storage.blocksize
    return pad(flat, (0, missing)).view(-1, storage.blocksize)


def _scale_of_weights(absmax: torch.Tensor, stored: torch.Tensor, stack: QuantizedStack) -> torch.Tensor:
    """`(out, in)`: the scale of each weight."""
    scales = absmax.repeat_interleave(stack.storage.blocksize)[: stored.numel()].view_as(stored)
    return scales.T if stack.is_transposed else scales
