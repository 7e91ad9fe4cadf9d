"""Several adapters combined into one, for each expert as PEFT's `add_weighted_adapter` does for a linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from .layer import MoeQLoraExperts

COMBINATION_TYPES = ("linear", "cat", "svd")


@dataclass(frozen=True)
class Combination:
    """How to combine.

    Args:
        adapters: names.
        weights: one for each adapter; may be negative.
        kind: `"linear"` (factors added, each scaled by the root of its weight), `"cat"` (ranks added up; exact) or
            `"svd"` (the best approximation of the exact sum in `rank`).
        rank: of the result.
        clamp: `svd` only: quantile at which values of the factors are cut, as PEFT's `svd_clamp`.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    kind: str
    rank: int
    clamp: float | None = None


def combined_rank(kind: str, ranks: Sequence[int], svd_rank: int | None) -> int:
    """The rank that the combination of adapters of the given ranks needs.

    Raises:
        ValueError: `kind` is none that experts know, or `linear` is asked of different ranks.
    """
    if kind not in COMBINATION_TYPES:
        raise ValueError(f"combination_type={kind!r} is not available for experts; choose from {COMBINATION_TYPES}.")
    if kind == "cat":
        return sum(ranks)
    if kind == "svd":
        return svd_rank or max(ranks)
    if len(set(ranks)) > 1:
        raise ValueError(f"combination_type='linear' needs adapters of one rank for experts, got {list(ranks)}.")
    return ranks[0]


@torch.no_grad()
def combine_experts(layer: MoeQLoraExperts, adapter_name: str, combination: Combination) -> None:
    """Fills the factors of `adapter_name`, which has rank `combination.rank` and scaling 1, on one experts module."""
    for projection in layer.r[adapter_name]:
        terms = []
        for name, weight in zip(combination.adapters, combination.weights):
            factors = layer.factors(projection, name)
            if factors is not None:
                A, B = (factor.detach().float() for factor in factors)
                terms.append((A, B, weight * layer.scaling[name][projection]))
        new_A, new_B = layer.factors(projection, adapter_name)
        new_A.zero_()
        new_B.zero_()
        if not terms:
            continue
        A, B = _combine(terms, combination)
        rank = A.shape[1]
        new_A[:, :rank] = A.to(new_A)
        new_B[:, :, :rank] = B.to(new_B)


def _combine(
    terms: list[tuple[torch.Tensor, torch.Tensor, float]], combination: Combination
) -> tuple[torch.Tensor, torch.Tensor]:
    if combination.kind == "linear":
        A = B = None
        for term_A, term_B, weight in terms:
            # the sign goes to one side, or a negative weight would cancel out
            root = math.sqrt(abs(weight))
            missing = combination.rank - term_A.shape[1]
            scaled_A = pad(term_A * math.copysign(root, weight), (0, 0, 0, missing))
            scaled_B = pad(term_B * root, (0, missing))
            A, B = (scaled_A, scaled_B) if A is None else (A + scaled_A, B + scaled_B)
        return A, B
    A = torch.cat([term_A * weight for term_A, _, weight in terms], dim=1)
    B = torch.cat([term_B for _, term_B, _ in terms], dim=2)
    return (A, B) if combination.kind == "cat" else _truncate(A, B, combination.rank, combination.clamp)


def _truncate(A: torch.Tensor, B: torch.Tensor, rank: int, clamp: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-`rank` approximation of `B @ A`, by QR of both factors and an SVD of the small core."""
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.transpose(1, 2))
    U, S, Vh = torch.linalg.svd(R_out @ R_in.transpose(1, 2), full_matrices=False)
    new_B = Q_out @ (U * S[:, None, :])[:, :, :rank]
    new_A = Vh[:, :rank] @ Q_in.transpose(1, 2)
    if clamp is not None:
        values = torch.cat([new_B.flatten(1), new_A.flatten(1)], dim=1)
        limit = torch.quantile(values, clamp, dim=1)[:, None, None]
        new_A, new_B = new_A.clamp(-limit, limit), new_B.clamp(-limit, limit)
    return new_A, new_B
