"""Quantizing the experts of a model that is in memory already, and back."""

from __future__ import annotations

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts import convert_experts, revert_experts
from ..quantization import FourBitFormat


class InMemoryQuantizer(HfQuantizer):
    """Tells transformers that experts were taken over after loading.

    It makes `save_pretrained` refuse: the checkpoint would hold packed experts, which a later `from_pretrained` does
    not know and replaces by random ones. `model.dequantize()` works.

    Args:
        inner: the quantizer that the model was loaded with, which goes on caring for its other layers.
        was_loaded_in_4bit: the model's flag of before.
    """

    def __init__(self, inner: HfQuantizer | None, was_loaded_in_4bit: bool) -> None:
        config = QuantizationConfigMixin(None) if inner is None else copy.copy(inner.quantization_config)
        # transformers' refusal quotes this
        config.quant_method = (
            "peft-moe-qlora in memory (before save_pretrained call merge_and_unload(dtype=torch.bfloat16), or without "
            "an adapter model.dequantize())"
        )
        super().__init__(config)
        self.inner = inner
        self.was_loaded_in_4bit = was_loaded_in_4bit

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return self.inner is None or self.inner.is_trainable

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "The model has adapters, so it can't be dequantized; call merge_and_unload(dtype=...) or unload()."
            )
        restore_experts(model, dtype)
        return model if self.inner is None else self.inner.dequantize(model, dtype=dtype)


def store_experts(model: nn.Module, storage: FourBitFormat | None, progressbar: bool) -> None:
    """`convert_experts`, and transformers knows of it."""
    convert_experts(model, storage, progressbar)
    for module in _transformers_models(model):
        quantizer = getattr(module, "hf_quantizer", None)
        if not isinstance(quantizer, InMemoryQuantizer):
            module.hf_quantizer = InMemoryQuantizer(quantizer, getattr(module, "is_loaded_in_4bit", False))
            # Trainer looks at it before it wraps a model in nn.DataParallel, which can't replicate packed weights
            module.is_loaded_in_4bit = True


def restore_experts(model: nn.Module, dtype: torch.dtype | None) -> None:
    """`revert_experts`, and transformers knows of it."""
    revert_experts(model, dtype)
    for module in _transformers_models(model):
        quantizer = getattr(module, "hf_quantizer", None)
        if isinstance(quantizer, InMemoryQuantizer):
            module.hf_quantizer = quantizer.inner
            module.is_loaded_in_4bit = quantizer.was_loaded_in_4bit


def _transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    """The model, or what it wraps, and their parts that could be saved by themselves."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
