"""Quantizing the experts of a model that is in memory already, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts import convert_experts, revert_experts
from ..quantization import FourBitFormat


class InMemoryQuantizer(HfQuantizer):
    """Tells transformers that experts were quantized after loading.

    It makes `save_pretrained` refuse: the checkpoint would hold packed experts, which a later `from_pretrained` does
    not know and replaces by random ones. `model.dequantize()` works.
    """

    def __init__(self) -> None:
        config = QuantizationConfigMixin(
            quant_method="peft-moe-qlora in memory (before save_pretrained call merge_and_unload(dtype=torch.bfloat16)"
            ", or without an adapter model.dequantize())"
        )
        super().__init__(config)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        revert_experts(model, dtype)
        return model

    def remove_quantization_config(self, model: nn.Module) -> None:
        del model.hf_quantizer


def store_experts(model: nn.Module, storage: FourBitFormat | None, progressbar: bool) -> None:
    """`convert_experts`, and transformers knows of it."""
    convert_experts(model, storage, progressbar)
    # a model whose linear layers are quantized too keeps the quantizer that it was loaded with
    if storage is not None and isinstance(model, PreTrainedModel) and _quantizer(model) is None:
        model.hf_quantizer = InMemoryQuantizer()


def restore_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """`revert_experts`, and transformers knows of it."""
    revert_experts(model, dtype)
    quantizer = _quantizer(model)
    if isinstance(quantizer, InMemoryQuantizer):
        quantizer.remove_quantization_config(model)


def _quantizer(model: nn.Module) -> Any:
    return getattr(model, "hf_quantizer", None)
