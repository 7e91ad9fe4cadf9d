"""Converts a model with quantized experts back to transformers' own classes."""

from __future__ import annotations

import copy
import re
from itertools import chain

import torch
from bitsandbytes.nn import Params4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from ..experts import move_hook, revert_experts
from ..quantized_linear import QuantizedLinear
from ..sharded import refuse_sharded

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ExpertsQuantizer(HfQuantizer):
    """The `hf_quantizer` of a model with `QuantizedExperts`; subclasses define how it is loaded and saved."""

    inner: HfQuantizer | None = None
    """Quantizer of the other layers; None if they are in floating point."""

    has_loaded_experts = False
    """Whether this quantizer has loaded the experts, so transformers' recorded conversions lack their stacks."""

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile decoding with a static cache."""
        # 4-bit layers of bitsandbytes can be compiled, although its quantizer doesn't declare it
        return self.inner is None or isinstance(self.inner, Bnb4BitHfQuantizer) or self.inner.is_compileable

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Dequantizes the model, experts and other layers.

        Args:
            model: model without an adapter; changed in place.
            dtype: dtype of the result, applied as in `from_pretrained(dtype=dtype)`. Default: quantized weights get
                the dtype of the model, and all others stay unchanged.

        Raises:
            ValueError: the model has an adapter, or is sharded over processes.
        """
        refuse_adapters(model)
        refuse_sharded(model, "dequantizing")
        found = model.dtype
        restore_linear(model, dtype)
        restore_experts(model, dtype)
        if self.inner is not None:
            model = self.inner.dequantize(model, dtype=dtype or found)
            for part in transformers_models(model):
                set_quantizer(part, None)
        if dtype is not None:
            cast_as_loaded(model, dtype)
        return model


class Undone(list):
    """An empty list of conversions, for saving a state dict whose conversions are already reverted.

    Args:
        before: the conversions of the model.
    """

    def __init__(self, before: list[WeightTransform] | None) -> None:
        super().__init__()
        self.before = before


def restore_experts(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Calls `revert_experts` and leaves the model with the quantizer and config of its other layers."""
    revert_experts(model, dtype)
    for part in transformers_models(model):
        quantizer = getattr(part, "hf_quantizer", None)
        if not isinstance(quantizer, ExpertsQuantizer):
            continue
        conversions = getattr(part, "_weight_conversions", None)
        if isinstance(conversions, Undone):
            conversions = conversions.before
        part._weight_conversions = None if quantizer.has_loaded_experts else conversions
        set_quantizer(part, quantizer.inner)


def restore_linear(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Dequantizes linear layers stored in formats of this package to `dtype`, by default their original dtype."""
    restored: dict[QuantizedLinear, nn.Linear] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not path or not isinstance(module, QuantizedLinear):
            continue
        if module not in restored:
            restored[module] = module.restore(dtype)
            move_hook(module, restored[module])
        parent_path, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, restored[module])


def set_quantizer(model: PreTrainedModel, quantizer: HfQuantizer | None) -> None:
    """Sets the quantizer of a model, None for none, in all attributes that transformers and other libraries read."""
    config = model.config
    is_in_config = getattr(config, "quantization_config", None) is not None
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (config, "quantization_config"),
        (config, "_is_quantized"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = quantizer is not None
    model.is_loaded_in_4bit = isinstance(quantizer, Bnb4BitHfQuantizer)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        model.quantization_method = quantizer.quantization_config.quant_method
        config._is_quantized = True
        if is_in_config:
            config.quantization_config = quantizer.quantization_config


def cast_as_loaded(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts a model to the dtypes that `from_pretrained(dtype=dtype)` gives.

    Parameters that the class keeps in fp32, such as rotary frequencies and some routers, are cast to fp32. Packed
    weights and parameters that the class doesn't have stay unchanged.

    Args:
        model: changed in place; LoRA layers may wrap its layers. A model that is not a `PreTrainedModel` stays
            unchanged.
        dtype: a floating-point dtype.
    """
    if not isinstance(model, PreTrainedModel):
        return
    expected = dtypes_as_loaded(model, dtype)
    for path, module in model.named_modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            wanted = expected.get(f"{path}.{name}".replace(".base_layer.", ".").removeprefix("."))
            if wanted is None or tensor is None or tensor.is_meta:
                continue
            if tensor.dtype not in _FLOATING or isinstance(tensor, Params4bit):
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(wanted)
            else:
                module._buffers[name] = tensor.to(wanted)
    for part in transformers_models(model):
        part.config.dtype = dtype


def dtypes_as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name -> dtype of every floating-point parameter and buffer after `from_pretrained(dtype=dtype)`."""
    with torch.device("meta"):
        fresh = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    tensors = chain(fresh.named_parameters(remove_duplicate=False), fresh.named_buffers(remove_duplicate=False))
    expected = {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}
    # transformers casts only tensors that it loads, so other buffers keep the dtype of the class
    for pattern, planned in fresh._get_dtype_plan(dtype).items():
        pattern = re.compile(pattern.replace("*", ".*"))
        expected |= {name: planned for name in fresh.state_dict() if name in expected and pattern.search(name)}
    return expected


def refuse_adapters(model: nn.Module) -> None:
    """Rejects a model with adapters, before it is dequantized or saved in full.

    Raises:
        ValueError: the model has an adapter.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The model has adapters. Call merge_and_unload(dtype=...) or unload() before you dequantize it or save it "
            "in full."
        )


def transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    """All `PreTrainedModel` modules in a model, itself included, outer ones first."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
