"""Experts classes that the general layout can't describe, one file for each."""

from __future__ import annotations

from torch import nn
from transformers.core_model_loading import WeightTransform

from .base import Architecture
from .liger import LIGER
from .llama4 import LLAMA4

_BY_CLASS = {architecture.class_name: architecture for architecture in (LIGER, LLAMA4)}

__all__ = ["Architecture", "architecture_of", "checkpoint_conversions", "declaration"]


def architecture_of(module: nn.Module) -> Architecture | None:
    """What we say of an experts module's class; None where the class speaks for itself."""
    return _BY_CLASS.get(type(module).__name__)


def declaration(module: nn.Module, name: str) -> bool | None:
    """The value of `is_transposed` and the like; None where neither the class nor we declare it."""
    architecture = architecture_of(module)
    return getattr(module, name, None) if architecture is None else architecture.declarations[name]


def checkpoint_conversions(model: nn.Module) -> list[WeightTransform]:
    """Conversions that transformers' mapping lacks, for the experts that a model has."""
    names = {type(module).__name__ for module in model.modules()} & _BY_CLASS.keys()
    return [conversion for name in sorted(names) for conversion in _BY_CLASS[name].conversions()]
