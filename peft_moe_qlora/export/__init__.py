"""Adapters and models for those who don't have this package."""

from .adapter_file import AdapterFile, ExpertFactors, read_adapter
from .convert import TARGETS, convert_adapter
from .edits import ONTO
from .merge import merge_checkpoint
from .merge_quantized import LAYOUTS, merge_quantized
from .merge_report import MergeReport, Verification
from .verify import verify_merge

__all__ = [
    "LAYOUTS",
    "ONTO",
    "TARGETS",
    "AdapterFile",
    "ExpertFactors",
    "MergeReport",
    "Verification",
    "convert_adapter",
    "merge_checkpoint",
    "merge_quantized",
    "read_adapter",
    "verify_merge",
]
