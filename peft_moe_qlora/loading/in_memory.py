"""Quantizing the experts of a model that is in memory already, and back."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts import convert_experts, revert_experts
from ..quantization import FourBitFormat
from .linear import keep_linear_as_stored
from .quantization_config import MoeQuantizationConfig
from .quantizer import MoeQuantizer, refuse_adapters


class InMemoryQuantizer(MoeQuantizer):
    """Tells transformers that experts were quantized after loading: `save_pretrained` and `dequantize` work.

    Args:
        inner: the quantizer that the model was loaded with, which goes on caring for its other layers.
        storage: of the experts.
        was_loaded_in_4bit: the model's flag of before.
    """

    def __init__(self, inner: Bnb4BitHfQuantizer | None, storage: FourBitFormat, was_loaded_in_4bit: bool) -> None:
        linear_config = None if inner is None else inner.quantization_config
        config = MoeQuantizationConfig(
            storage.quant_type,
            storage.blocksize,
            storage.double_quant,
            quantize_linear=inner is not None,
            compute_dtype=None if linear_config is None else linear_config.bnb_4bit_compute_dtype,
        )
        super().__init__(config, pre_quantized=True)
        self.linear = self.inner = inner
        self.was_loaded_in_4bit = was_loaded_in_4bit

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        if self.state_dict_to_save is None:
            model.config.quantization_config = self.quantization_config
        return super().get_state_dict_and_metadata(model)


class UnsavableQuantizer(HfQuantizer):
    """Makes `save_pretrained` refuse: experts that were taken over, in a storage or beside one that we can't load.

    Args:
        inner: the quantizer that the model was loaded with.
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
        refuse_adapters(model)
        restore_experts(model, dtype)
        return model if self.inner is None else self.inner.dequantize(model, dtype=dtype)


def store_experts(model: nn.Module, storage: FourBitFormat | None, progressbar: bool) -> None:
    """`convert_experts`, and transformers knows of it.

    Raises:
        ValueError: see `convert_experts` and `keep_linear_as_stored`; the model is then unchanged.
    """
    keep_linear_as_stored(model)
    convert_experts(model, storage, progressbar)
    register_storage(model, storage)


def register_storage(model: nn.Module, storage: FourBitFormat | None) -> None:
    """Lets transformers know how the experts of a model are stored, unless it has loaded them so."""
    if any(type(getattr(module, "hf_quantizer", None)) is MoeQuantizer for module in _transformers_models(model)):
        return
    for module in _transformers_models(model):
        quantizer = getattr(module, "hf_quantizer", None)
        if isinstance(quantizer, (InMemoryQuantizer, UnsavableQuantizer)):
            continue
        was_loaded_in_4bit = getattr(module, "is_loaded_in_4bit", False)
        if storage is not None and (quantizer is None or isinstance(quantizer, Bnb4BitHfQuantizer)):
            module.hf_quantizer = InMemoryQuantizer(quantizer, storage, was_loaded_in_4bit)
        else:
            module.hf_quantizer = UnsavableQuantizer(quantizer, was_loaded_in_4bit)
        # Trainer looks at it before it wraps a model in nn.DataParallel, which can't replicate packed weights
        module.is_loaded_in_4bit = True


def restore_experts(model: nn.Module, dtype: torch.dtype | None) -> None:
    """`revert_experts`, and transformers knows of it."""
    revert_experts(model, dtype)
    for module in _transformers_models(model):
        quantizer = getattr(module, "hf_quantizer", None)
        if isinstance(quantizer, (InMemoryQuantizer, UnsavableQuantizer)):
            module.hf_quantizer = quantizer.inner
            module.is_loaded_in_4bit = quantizer.was_loaded_in_4bit
            _set_config(module, quantizer.inner)
            if not getattr(module, "_weight_conversions", True):  # emptied when the model was saved
                module._weight_conversions = None
        elif isinstance(quantizer, MoeQuantizer):
            module.hf_quantizer = quantizer.linear
            module.is_loaded_in_4bit = quantizer.linear is not None
            _set_config(module, quantizer.linear)
            module._weight_conversions = None


def _set_config(model: PreTrainedModel, quantizer: HfQuantizer | None) -> None:
    if isinstance(getattr(model.config, "quantization_config", None), MoeQuantizationConfig):
        if quantizer is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = quantizer.quantization_config


def _transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    """The model, or what it wraps, and their parts that could be saved by themselves."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
