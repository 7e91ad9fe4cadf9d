"""The layouts of saved adapters: this package's own, and those of PEFT, serving engines and mlx-lm."""

from .adapter_file import AdapterFile, ExpertFactors
from .convert import TARGETS, convert_adapter
from .foreign import LORA_B_ORDERS, QUANT_TYPE_NAMES, ReadOptions
from .live import adapter_for_engine
from .read import read_adapter

__all__ = [
    "LORA_B_ORDERS",
    "QUANT_TYPE_NAMES",
    "TARGETS",
    "AdapterFile",
    "ExpertFactors",
    "ReadOptions",
    "adapter_for_engine",
    "convert_adapter",
    "read_adapter",
]
