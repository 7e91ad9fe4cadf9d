"""Which implementation computes a grouped product, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class ComputePath:
    """A choice and its reason, for the report.

    Args:
        name: `"grouped_mm"`, torch's grouped matrix product over all experts in one launch, or `"loop"`, one product
            for each expert that has rows.
        reason: why, in a few words.
    """

    name: Literal["grouped_mm", "loop"]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_path(device: torch.device, dtype: torch.dtype, in_features: int, out_features: int) -> ComputePath:
    """The path for rows `(S, in_features)` times a stack, in `dtype` on `device`."""
    if device.type != "cuda":
        return ComputePath("loop", f"torch's grouped product is not used on {device.type}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return ComputePath("loop", "torch's grouped product needs compute capability 8.0")
    if dtype != torch.bfloat16:
        return ComputePath("loop", f"torch's grouped product is in bfloat16, not {dtype}")
    if in_features % 8 or out_features % 8:
        # the rows of every operand have to start at multiples of 16 bytes
        return ComputePath("loop", f"{in_features} x {out_features} features are no multiples of 8")
    return ComputePath("grouped_mm", "bfloat16 on a GPU")
