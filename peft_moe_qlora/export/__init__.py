"""Adapters and models for those who don't have this package, and adapters of theirs."""

from .adapter_file import AdapterFile, ExpertFactors
from .convert import TARGETS, convert_adapter
from .edits import ONTO
from .live import kl_divergence, next_token_logits
from .merge import merge_checkpoint
from .merge_quantized import LAYOUTS, merge_quantized
from .merge_report import MergeReport, Verification
from .reading import read_adapter
from .source import LORA_B_ORDERS, QUANT_TYPE_NAMES, ReadOptions
from .verify import verify_merge

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
    "read_adapter",
    "verify_merge",
]
