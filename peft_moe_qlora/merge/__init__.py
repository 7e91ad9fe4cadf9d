"""Merging adapters into the weights, in memory or on disk, and verifying the result."""

from ..loading.disk.for_engines import ENGINE_LAYOUTS
from .check import MergeCheck
from .checkpoint import merge_checkpoint
from .edits import ONTO
from .in_memory import ROUNDINGS
from .live_weights import LiveWeights, live_weights
from .quantized import LAYOUTS, merge_quantized
from .report import MergeReport, Verification
from .unmerged import kl_divergence, next_token_logits, plan_unmerged, read_windows
from .verify import verify_merge

__all__ = [
    "ENGINE_LAYOUTS",
    "LAYOUTS",
    "ONTO",
    "ROUNDINGS",
    "LiveWeights",
    "MergeCheck",
    "MergeReport",
    "Verification",
    "kl_divergence",
    "live_weights",
    "merge_checkpoint",
    "merge_quantized",
    "next_token_logits",
    "plan_unmerged",
    "read_windows",
    "verify_merge",
]
