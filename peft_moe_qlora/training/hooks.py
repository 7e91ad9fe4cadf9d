"""Hooks of modules inside a layer, which neither CUDA graphs nor compiled layers call."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def kind_of_hooks(module: nn.Module) -> str | None:
    """`"forward"` or `"backward"` if a module has such hooks; None without hooks and for those of transformers.

    transformers' hooks make inputs require gradients, or record outputs.
    """
    forward = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # methods of builtin types have None
    if any(not (hook.__module__ or "").startswith("transformers.") for hook in forward):
        return "forward"
    return "backward" if module._backward_hooks or module._backward_pre_hooks else None


def modules_with_hooks(layer: nn.Module) -> list[nn.Module]:
    """The modules inside a layer that have hooks; `layer.modules()` takes twice as long."""
    found: list[nn.Module] = []
    left = list(layer._modules.values())
    while left:
        module = left.pop()
        if module is not None:
            if has_hooks(module):
                found.append(module)
            left += module._modules.values()
    return found
