"""Rejects optimizers that support only 2-D factors, before their first step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layer import ExpertsLora

# class -> the function that creates it. PEFT's Riemannian optimizer would not precondition the factors of experts
_OF_MATRICES = {
    "LoraFAOptimizer": "create_lorafa_optimizer",
    "RiemannianPreconditionedOptimizer": "create_riemannian_optimizer",
}
# packages whose optimizers project gradients as matrices in parameter groups with a rank, and are Adam or Adafactor in
# other groups. For stacks they only report mismatched shapes
_PROJECTING = ("apollo_torch", "galore_torch")


def refuse_optimizers_of_matrices(model: nn.Module) -> None:
    """Makes optimizers for 2-D factors raise a ValueError in a step on expert factors of this model.

    Args:
        model: a model that has, or will have, `ExpertsLora` layers.
    """
    handle = register_optimizer_step_pre_hook(_Check(model))
    weakref.finalize(model, handle.remove)


class _Check:
    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        kind, model = type(optimizer), self.model()
        package = kind.__module__.partition(".")[0]
        if model is None or (kind.__name__ not in _OF_MATRICES and package not in _PROJECTING):
            return
        groups = [group for group in optimizer.param_groups if kind.__name__ in _OF_MATRICES or "rank" in group]
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        for path, factor in _expert_factors(model):
            if id(factor) in stepped:
                name, remedy = _name_and_remedy(kind, package)
                raise ValueError(
                    f"{name} supports only 2-D factors, but the factors of {path} are 3-D stacks of shape "
                    f"{tuple(factor.shape)}. No parameter was changed. {remedy}"
                )


def _name_and_remedy(kind: type, package: str) -> tuple[str, str]:
    if kind.__name__ in _OF_MATRICES:
        return f"peft.optimizers.{_OF_MATRICES[kind.__name__]}", (
            "Use an element-wise optimizer, such as torch.optim.AdamW or create_loraplus_optimizer, or adapt only "
            "linear layers. create_lorafa_optimizer has frozen the A factors; call "
            "model.set_requires_grad(adapter_name) to unfreeze them."
        )
    return f"{package}'s {kind.__name__}", (
        "Put the factors of experts into a parameter group without a rank, as Trainer does, or use an element-wise "
        "optimizer, such as torch.optim.AdamW."
    )


def _expert_factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, layer in model.named_modules():
        if isinstance(layer, ExpertsLora):
            for adapter_name in layer.lora_A:
                yield from ((path, factor) for factor in layer.factors(adapter_name))
