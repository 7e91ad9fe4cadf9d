"""Adapters and models for those who don't have this package, and adapters of theirs."""

from .adapter_file import AdapterFile, ExpertFactors
from .convert import TARGETS, convert_adapter
from .merging.checkpoint import merge_checkpoint
from .merging.edits import ONTO
from .merging.live import kl_divergence, next_token_logits, plan_live, read_windows
from .merging.quantized import LAYOUTS, merge_quantized
from .merging.report import MergeReport, Verification
from .merging.verify import verify_merge
from .readers.read import read_adapter
from .readers.source import LORA_B_ORDERS, QUANT_TYPE_NAMES, ReadOptions

__all__ = [
    "LAYOUTS",
    "LORA_B_ORDERS",
    "ONTO",
    "QUANT_TYPE_NAMES",
    "TARGETS",
    "AdapterFile",
    "ExpertFactors",
    "MergeReport",
    "ReadOptions",
    "Verification",
    "convert_adapter",
    "kl_divergence",
    "merge_checkpoint",
    "merge_quantized",
    "next_token_logits",
    "plan_live",
    "read_adapter",
    "read_windows",
    "verify_merge",
]
