"""Converts an adapter of a text model into one of the multimodal model that its checkpoint contains."""

from __future__ import annotations

from dataclasses import replace

import torch

from .adapter_file import AdapterFile
from .base_model import BaseModel


def in_whole_model(adapter: AdapterFile, base: BaseModel) -> tuple[AdapterFile, BaseModel]:
    """The adapter under the names of the class that the checkpoint's config names, and a model of that class.

    Args:
        adapter: a uniform adapter (`uniform`), because rank patterns depend on names.
        base: the model that it was trained on.

    Raises:
        ValueError: a layer has no counterpart in the whole model, or several.
    """
    if not base.is_text_only:
        return adapter, base
    whole = BaseModel.open(base.directory)
    start, start_in_whole = (next(iter(model.layouts)).partition("layers.")[0] for model in (base, whole))

    def renamed(name: str) -> str:
        if name.startswith(start):
            return start_in_whole + name.removeprefix(start)
        found = [layer for layer in whole.layers() if layer == name or layer.endswith(f".{name}")]
        if len(found) != 1:
            raise ValueError(
                f"{name} is a layer of {type(base.model).__name__}, but {base.directory} contains a "
                f"{type(whole.model).__name__}, which has {found or 'no layer'} with this name. Merge the adapter "
                "instead."
            )
        return found[0]

    non_expert: dict[str, torch.Tensor] = {}
    for key, tensor in adapter.non_expert.items():
        name, lora, end = key.partition(".lora_")
        non_expert[renamed(name) + lora + end] = tensor
    experts = tuple(replace(factors, path=renamed(factors.path)) for factors in adapter.experts)
    return AdapterFile(adapter.config, experts, non_expert), whole
