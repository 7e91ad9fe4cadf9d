"""Selects the implementation that computes the experts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from .cached_constant import cached_constant
from .kernels.tuning import tiles_origin

logger = logging.getLogger(__name__)

LARGEST_RANK = 128
"""Largest rank of a low-rank term in the fused layer; larger ones do not fit into shared memory with the tiles."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ComputePath:
    """An implementation and the reason for its choice, for the report.

    Args:
        name: `"fused"`, the whole layer in Triton kernels; `"triton"`, a Triton kernel for this product;
            `"grouped_mm"`, torch's grouped matrix product over all experts in one launch; or `"loop"`, one product for
            each expert that has rows.
        reason: the reason.
    """

    name: Literal["fused", "triton", "grouped_mm", "loop"]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@cached_constant
def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels do not support a dtype on a device; None if they do."""
    if device.type != "cuda":
        return f"the kernels require a GPU, not {device.type}"
    if torch.version.hip is not None:
        return "the kernels are not tested on ROCm"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels require compute capability 8.0 or later"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels do not support {dtype}"
    return None


def choose_path(device: torch.device, dtype: torch.dtype, in_features: int, out_features: int) -> ComputePath:
    """The path for the product of `(S, in_features)` rows with a frozen stack, in `dtype` on `device`."""
    reason = why_no_kernels(device, dtype)
    if reason is None:
        return ComputePath("triton", f"{dtype} on a GPU, {tiles_origin(device, dtype)}")
    return choose_library_path(device, dtype, in_features, out_features, reason)


def choose_library_path(
    device: torch.device, dtype: torch.dtype, in_features: int, out_features: int, reason: str = ""
) -> ComputePath:
    """The path for rows times `(E, in_features, out_features)` matrices in the same dtype, without Triton."""
    if device.type != "cuda":
        return ComputePath("loop", reason or f"torch's grouped_mm is not used on {device.type}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return ComputePath("loop", "torch's grouped_mm requires compute capability 8.0 or later")
    if dtype != torch.bfloat16:
        return ComputePath("loop", f"torch's grouped_mm requires bfloat16, not {dtype}")
    if in_features % 8 or out_features % 8:
        # rows of every operand must be 16-byte aligned
        return ComputePath("loop", f"{in_features} x {out_features} features are not multiples of 8")
    return ComputePath("grouped_mm", reason or "bfloat16 on a GPU")


@cache
def log_once(message: str) -> None:
    """Logs a message once, as a warning."""
    logger.warning(message)
