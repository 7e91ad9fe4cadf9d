"""QLoRA for mixture-of-experts models with fused experts, as a PEFT method.

Importing the package registers the method with PEFT; importing it again changes nothing.

Modules, in order of their dependencies: each imports only those above it.

    quiet_import        import of bitsandbytes without its log messages
    progress            progress bars
    sharded             parameters sharded by FSDP2 or ZeRO-3
    quantization        storage formats of weights
    ops                 computation of a layer of experts
    experts             experts modules, with or without an adapter
    quantized_linear    linear layers with a weight in one of the formats
    options             table of the adapter's options
    saved_adapter       files of a saved adapter
    config, layer, linear_lora, quantized_linear_lora
                        the configuration; LoRA on stacks of experts, linear layers and quantized linear layers
    factor_shapes, unadaptable, targets, base_identity, base_names, report
                        matching a config with a model: shapes, targets, rejected layers, identity, names, report
    loading             loading and saving checkpoints
    layouts             layouts of saved adapters: one module per layout, which reads and writes it
    merge               merging in memory and on disk, and its verification
    training            preparation of a model for training, CUDA graphs, checks
    weighted_adapter    weighted combination of adapters
    model               the tuner, called by PEFT
    cli                 the command line
"""

__version__ = "0.1.0"

from . import quiet_import as quiet_import  # before PEFT, which imports bitsandbytes too

# isort: split
from peft import mapping as _mapping

from .config import MoeQLoraConfig, MoeQLoraPeftType
from .experts import QuantizedExperts
from .layer import ExpertsLora
from .loading import (
    CheckpointError,
    MoeQuantizationConfig,
    load_experts,
    load_quantized,
    read_part_of_experts,
    save_bitsandbytes,
)
from .model import MoeQLoraModel
from .report import ExpertsReport, StackReport, experts_report
from .training import prepare_model_for_training, quantize_experts

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
    "read_part_of_experts",
    "save_bitsandbytes",
]

# `peft.utils.register_peft_method` requires a unique prefix. This method uses the prefix of LoRA: one adapter covers
# experts and linear layers, and the keys of linear layers are the same as LoRA's.
_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MoeQLoraPeftType.MOE_QLORA] = MoeQLoraConfig
_mapping.PEFT_TYPE_TO_TUNER_MAPPING[MoeQLoraPeftType.MOE_QLORA] = MoeQLoraModel
_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[MoeQLoraPeftType.MOE_QLORA] = MoeQLoraModel.prefix
