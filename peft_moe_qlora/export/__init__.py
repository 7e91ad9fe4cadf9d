"""Adapters and models for those who don't have this package, and adapters of theirs."""

from .adapter_file import AdapterFile, ExpertFactors
from .convert import TARGETS, convert_adapter
from .reading import read_adapter
from .source import LORA_B_ORDERS, QUANT_TYPE_NAMES, ReadOptions

__all__ = [
    "LORA_B_ORDERS",
    "QUANT_TYPE_NAMES",
    "TARGETS",
    "AdapterFile",
    "ExpertFactors",
    "ReadOptions",
    "convert_adapter",
    "read_adapter",
]
