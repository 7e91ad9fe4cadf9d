"""Loading, inspecting, saving and restoring models with quantized experts."""

from .checkpoint import Checkpoint, CheckpointError
from .in_memory import store_experts
from .inspection import Inspection, inspect_checkpoint
from .load import load_experts, load_quantized
from .part_of_experts import read_part_of_experts
from .quantization_config import MoeQuantizationConfig
from .quantizer import MoeQuantizer
from .restoring import cast_as_loaded, restore_experts, restore_linear
from .save_bnb import save_bitsandbytes

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Inspection",
    "MoeQuantizationConfig",
    "MoeQuantizer",
    "cast_as_loaded",
    "inspect_checkpoint",
    "load_experts",
    "load_quantized",
    "read_part_of_experts",
    "restore_experts",
    "restore_linear",
    "save_bitsandbytes",
    "store_experts",
]
