"""Keeps the names of unquantized stacks in the base model's state dict as they were before the conversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .quantization import DenseStack, Stack


def keep_base_names(model: nn.Module) -> None:
    """Renames `experts.down_proj.weight` to `experts.down_proj` in `model.state_dict()`; loading accepts both names.

    PEFT's `get_base_model_state_dict` and `set_base_model_state_dict` use these names. The state dict of a module that
    wraps the model, such as a `PeftModel`, keeps the names of the parameters.

    Args:
        model: the base model, with its adapters.
    """
    model.register_state_dict_post_hook(_shorten)
    model.register_load_state_dict_pre_hook(_lengthen)


def _shorten(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    if not prefix:
        _rename(state_dict, {f"{path}.weight": path for path in _dense_stacks(model)})


def _lengthen(model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    _rename(state_dict, {prefix + path: f"{prefix}{path}.weight" for path in _dense_stacks(model)})


def _dense_stacks(model: nn.Module) -> list[str]:
    """Paths of all stacks; empty if some are packed, since such a model is saved with the names of the parameters."""
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, Stack)}
    return list(stacks) if all(isinstance(stack, DenseStack) for stack in stacks.values()) else []


def _rename(state_dict: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Renames keys in place and keeps their order."""
    if names.keys() & state_dict.keys():
        for key in list(state_dict):
            state_dict[names.get(key, key)] = state_dict.pop(key)
