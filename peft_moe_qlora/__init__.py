"""QLoRA for mixture-of-experts models with fused experts, as a PEFT method.

Importing the package registers the method with PEFT; importing it again changes nothing.

Its rooms, each of which uses those above it only:

    quiet_import        bitsandbytes, without a notice that is not for users
    progress            when a bar of progress appears
    sharded             which parameters an engine has sharded
    quantization        how a stack of weights is stored
    ops                 how a layer of experts is computed
    experts             what an experts module is, adapted or not
    quantized_linear    a linear layer whose weight is stored in a format
    options             of an adapter's config, in one table
    saved_adapter       the files of an adapter
    config, layer, linear_lora, quantized_linear_lora
                        the configuration; LoRA on one stack, on a linear layer, and on one that is stored in a format
    factor_shapes, unadaptable, targets, base_identity, base_names, report
                        what a config asks for in a model, what is refused, what the model was, and has become
    loading             checkpoints into models and back
    layouts             of saved adapters: one file for each, which reads and writes it
    merge               in memory, on disk, and whether the result is what the adapter was
    training            what a training needs beside the layers
    weighted_adapter    several adapters as one
    model               the tuner, which PEFT calls
    cli
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

# `peft.utils.register_peft_method` insists on a prefix that no other method has. Ours is LoRA's, because one adapter
# covers linear layers, whose keys stay LoRA's, and experts.
_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MoeQLoraPeftType.MOE_QLORA] = MoeQLoraConfig
_mapping.PEFT_TYPE_TO_TUNER_MAPPING[MoeQLoraPeftType.MOE_QLORA] = MoeQLoraModel
_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[MoeQLoraPeftType.MOE_QLORA] = MoeQLoraModel.prefix
