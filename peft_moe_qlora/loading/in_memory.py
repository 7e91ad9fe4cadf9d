"""Quantizes the experts of a model that is already loaded."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts import convert_experts
from ..quantization import Format
from ..sharded import refuse_fsdp1
from .linear import keep_linear_as_stored
from .quantization_config import MoeQuantizationConfig
from .quantizer import MoeQuantizer
from .restoring import ExpertsQuantizer, transformers_models


class InMemoryQuantizer(MoeQuantizer):
    """The quantizer of a model whose experts were quantized after loading; supports saving and `dequantize`.

    Args:
        inner: the quantizer that loaded the model, which still handles the other layers.
        storage: storage format of the experts.
    """

    has_loaded_experts = False

    def __init__(self, inner: Bnb4BitHfQuantizer | None, storage: Format) -> None:
        linear_config = None if inner is None else inner.quantization_config
        config = MoeQuantizationConfig(
            storage=str(storage),
            quantize_linear=inner is not None,
            compute_dtype=None if linear_config is None else linear_config.bnb_4bit_compute_dtype,
        )
        super().__init__(config, pre_quantized=True)
        self.inner = inner


class UnsavableQuantizer(ExpertsQuantizer):
    """The quantizer of a model that `save_pretrained` rejects, because this package could not load it again.

    Its experts are not quantized, or its other layers are quantized by a method other than bitsandbytes in 4 bits.

    Args:
        inner: the quantizer that loaded the model.
        is_packed: whether the experts are quantized.
    """

    def __init__(self, inner: HfQuantizer | None, is_packed: bool) -> None:
        config = QuantizationConfigMixin(None) if inner is None else copy.copy(inner.quantization_config)
        # transformers includes this in its error
        config.quant_method = (
            "peft-moe-qlora in memory (call merge_and_unload(dtype=torch.bfloat16), or without an adapter "
            "model.dequantize(), before save_pretrained)"
        )
        super().__init__(config)
        self.inner = inner
        self.is_packed = is_packed

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        if self.is_packed:
            refuse_fsdp1()
        return self.inner is None or self.inner.is_trainable


def store_experts(model: nn.Module, storage: Format | None, progressbar: bool) -> None:
    """Calls `convert_experts` and registers the storage in the model's quantization config.

    Raises:
        ValueError: see `convert_experts` and `keep_linear_as_stored`; the model is then unchanged.
    """
    keep_linear_as_stored(model)
    convert_experts(model, storage, progressbar)
    register_storage(model, storage)


def register_storage(model: nn.Module, storage: Format | None) -> None:
    """Sets the quantizer of a model whose experts were converted after loading; one set by loading is kept."""
    models = transformers_models(model)
    if any(type(getattr(part, "hf_quantizer", None)) is MoeQuantizer for part in models):
        return
    inner = _quantizers(models)
    for part in models:
        quantizer = inner[part]
        if isinstance(quantizer, ExpertsQuantizer):
            continue
        if storage is not None and (quantizer is None or isinstance(quantizer, Bnb4BitHfQuantizer)):
            part.hf_quantizer = InMemoryQuantizer(quantizer, storage)
        else:
            part.hf_quantizer = UnsavableQuantizer(quantizer, storage is not None)
        if storage is not None:
            # keeps Trainer from wrapping the model in nn.DataParallel, which can't replicate packed weights
            part.is_loaded_in_4bit = True


def _quantizers(models: list[PreTrainedModel]) -> dict[PreTrainedModel, HfQuantizer | None]:
    """The quantizer of each model. transformers sets it on the loaded model, but not on its submodels."""
    found: dict[PreTrainedModel, HfQuantizer | None] = {}
    for model in models:  # outer ones first
        quantizer = getattr(model, "hf_quantizer", None) or found.get(model)
        for part in transformers_models(model):
            found[part] = quantizer
    return found
