"""Quantization error of merged weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


def _sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().square().sum()


@dataclass
class Fidelity:
    """Error sums over the weights of a stack or of any other tensor; filled by `add`.

    Args:
        error: sum of `(stored - exact)^2`.
        norm: sum of `exact^2`.
        delta: sum of `(exact - before)^2`.
        kept: sum of `(stored - before) * (exact - before)`.
    """

    error: torch.Tensor | float = field(default=0.0)
    norm: torch.Tensor | float = field(default=0.0)
    delta: torch.Tensor | float = field(default=0.0)
    kept: torch.Tensor | float = field(default=0.0)

    def add(self, before: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor) -> None:
        """Adds weights to the sums; all three tensors have the same shape and device.

        Args:
            before: weights before merging.
            exact: merged weights before rounding.
            stored: merged weights as dequantized from storage.
        """
        before, exact, stored = before.float(), exact.float(), stored.float()
        delta = exact - before
        self.error = self.error + _sum_of_squares(stored - exact)
        self.norm = self.norm + _sum_of_squares(exact)
        self.delta = self.delta + _sum_of_squares(delta)
        self.kept = self.kept + ((stored - before).double() * delta.double()).sum()

    @property
    def relative_error(self) -> float:
        """L2 error of the stored weights, relative to the exact weights."""
        return _ratio(self.error, self.norm)

    @property
    def relative_delta(self) -> float:
        """L2 norm of the delta, relative to the exact weights."""
        return _ratio(self.delta, self.norm)

    @property
    def delta_kept(self) -> float | None:
        """Share of the delta that survives in the stored weights, 1 for all of it; None if the delta is zero."""
        delta = float(self.delta)
        return float(self.kept) / delta if delta > 0 else None


def _ratio(part: torch.Tensor | float, whole: torch.Tensor | float) -> float:
    return math.sqrt(float(part) / float(whole)) if float(whole) > 0 else 0.0
