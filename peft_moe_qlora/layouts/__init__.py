"""The layouts that saved adapters come in: this package's own, and those of PEFT, serving engines and mlx-lm."""

from .adapter_file import AdapterFile, ExpertFactors
from .convert import TARGETS, convert_adapter
from .read import read_adapter
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
