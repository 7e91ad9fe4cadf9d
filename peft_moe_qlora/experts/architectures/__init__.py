"""Experts classes that do not declare their layout, one module per class."""

from __future__ import annotations

from torch import nn
from transformers.core_model_loading import WeightTransform

from .base import Architecture
from .liger import LIGER
from .llama4 import LLAMA4

_BY_CLASS = {architecture.class_name: architecture for architecture in (LIGER, LLAMA4)}

__all__ = ["Architecture", "architecture_of", "checkpoint_conversions", "declaration"]


def architecture_of(module: nn.Module) -> Architecture | None:
    """The description of an experts module's class in this package; None if the class declares its layout."""
    return _BY_CLASS.get(type(module).__name__)


def declaration(module: nn.Module, name: str) -> bool | None:
    """The value of a flag such as `is_transposed`; None if neither the class nor this package declares it."""
    architecture = architecture_of(module)
    return getattr(module, name, None) if architecture is None else architecture.declarations[name]


def checkpoint_conversions(model: nn.Module) -> list[WeightTransform]:
    """Weight conversions for the experts of a model that transformers' mapping does not have."""
    names = {type(module).__name__ for module in model.modules()} & _BY_CLASS.keys()
    return [conversion for name in sorted(names) for conversion in _BY_CLASS[name].conversions()]
