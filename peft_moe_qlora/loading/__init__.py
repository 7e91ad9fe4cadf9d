"""How a model comes to hold quantized experts."""

from .checkpoint import Checkpoint, CheckpointError
from .in_memory import restore_experts, store_experts
from .load import load_experts, load_quantized
from .quantization_config import MoeQuantizationConfig
from .quantizer import MoeQuantizer
from .save_bnb import save_bitsandbytes

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MoeQuantizationConfig",
    "MoeQuantizer",
    "load_experts",
    "load_quantized",
    "restore_experts",
    "save_bitsandbytes",
    "store_experts",
]
