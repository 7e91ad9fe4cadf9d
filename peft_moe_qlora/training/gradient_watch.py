"""Warns once about adapted layers that got no gradient in the first backward."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle


def watch_gradients(model: nn.Module) -> None:
    """Warns in the second training forward about trainable layers that got no gradient in the previous backward.

    The warning waits until at least one layer has a gradient. A model compiled as a whole is not watched.

    Args:
        model: the base model, with its adapters.
    """
    if not any(isinstance(hook, GradientWatch) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(GradientWatch())


class GradientWatch:
    """A forward pre-hook that removes itself and its hooks on factors after the first backward.

    It adds the hooks on factors in the first training forward, because FSDP2 replaces parameters before. For a copied
    or unpickled model, the watch starts again.
    """

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.watched: set[str] = set()
        self.reached: set[str] = set()

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or not model.training or not torch.is_grad_enabled():
            return
        if not self.watched:
            for path, factor in _trainable_factors(model):
                self.watched.add(path)
                self.handles.append(
                    factor.register_post_accumulate_grad_hook(lambda _, path=path: self.reached.add(path))
                )
        if self.reached or not self.watched:
            self._remove(model)
            if self.watched != self.reached:
                warnings.warn(_message(self.watched - self.reached, self.reached), RuntimeWarning, stacklevel=2)

    def _remove(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        # a copy of the model has no handle for this hook
        for key, hook in list(model._forward_pre_hooks.items()):
            if hook is self:
                del model._forward_pre_hooks[key]

    def __reduce__(self) -> tuple:
        return GradientWatch, ()


def _trainable_factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`(path of the layer, factor)`."""
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for name in layer.adapter_layer_names:
            for factors in getattr(layer, name).values():
                for factor in [factors] if isinstance(factors, torch.Tensor) else factors.parameters():
                    # in replicas of DataParallel, parameters are not leaf tensors
                    if factor.requires_grad and factor.is_leaf:
                        yield path, factor


def _message(missing: set[str], reached: set[str]) -> str:
    parts = _parts(missing, reached)
    pattern = "|".join(re.escape(part).replace(r"\*", r"\d+") for part in parts)
    return (
        f"Adapted layers got no gradient in the first backward: {', '.join(parts)}. Either the batch did not use them "
        "(a vision tower without an image), or LoRA cannot train them, because the model reads their weights without "
        "calling them or uses them only for selection. Layers without a gradient are not trained, and "
        f'DistributedDataParallel fails on them. To exclude them, set exclude_modules=r"({pattern})(\\..*)?".'
    )


def _parts(missing: set[str], reached: set[str]) -> list[str]:
    """The largest parts of the model that contain only missing layers; `*` stands for any number."""
    reached_parts = {part for path in reached for above in _and_above(path) for part in (above, _numberless(above))}
    largest = set()
    for path in missing:
        parts = (part for above in _and_above(path) for part in (_numberless(above), above))
        largest.add(next(part for part in parts if part not in reached_parts))
    return sorted(largest)


def _and_above(path: str) -> list[str]:
    """A path and the paths of its parents, outermost first."""
    names = path.split(".")
    return [".".join(names[:length]) for length in range(1, len(names) + 1)]


def _numberless(path: str) -> str:
    return ".".join("*" if name.isdigit() else name for name in path.split("."))
