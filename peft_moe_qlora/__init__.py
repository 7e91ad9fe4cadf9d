"""QLoRA for mixture-of-experts models with fused experts, as a PEFT method.

Importing the package registers the method with PEFT; importing it again changes nothing.
"""

__version__ = "0.1.0"

from peft import mapping as _mapping

from .config import MoeQLoraConfig, MoeQLoraPeftType
from .experts import QuantizedExperts
from .layer import ExpertsLora
from .loading import CheckpointError, MoeQuantizationConfig, load_experts, load_quantized, save_bitsandbytes
from .model import MoeQLoraModel
from .prepare import prepare_model_for_training, quantize_experts
from .report import ExpertsReport, StackReport, experts_report

__all__ = [
    "CheckpointError",
    "ExpertsLora",
    "ExpertsReport",
    "MoeQLoraConfig",
    "MoeQLoraModel",
    "MoeQuantizationConfig",
    "QuantizedExperts",
    "StackReport",
    "experts_report",
    "load_experts",
    "load_quantized",
    "prepare_model_for_training",
    "quantize_experts",
    "save_bitsandbytes",
]

# `peft.utils.register_peft_method` insists on a prefix that no other method has. Ours is LoRA's, because one adapter
# covers linear layers, whose keys stay LoRA's, and experts.
_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MoeQLoraPeftType.MOE_QLORA] = MoeQLoraConfig
_mapping.PEFT_TYPE_TO_TUNER_MAPPING[MoeQLoraPeftType.MOE_QLORA] = MoeQLoraModel
_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[MoeQLoraPeftType.MOE_QLORA] = MoeQLoraModel.prefix
