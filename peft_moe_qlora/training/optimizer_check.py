"""Refuses PEFT's optimizers that know factors of two dimensions only, before their first step changes anything."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layer import ExpertsLora

# class -> the function that makes it. PEFT's Riemannian one would step experts as if there were no preconditioner
_OF_MATRICES = {
    "LoraFAOptimizer": "create_lorafa_optimizer",
    "RiemannianPreconditionedOptimizer": "create_riemannian_optimizer",
}


def refuse_optimizers_of_matrices(model: nn.Module) -> None:
    """From now on, a step of such an optimizer over experts' factors of this model raises a ValueError.

    Args:
        model: with `ExpertsLora` somewhere in it, now or later.
    """
    handle = register_optimizer_step_pre_hook(_Check(model))
    weakref.finalize(model, handle.remove)


class _Check:
    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        function = _OF_MATRICES.get(type(optimizer).__name__)
        model = self.model()
        if function is None or model is None:
            return
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for path, factor in _expert_factors(model):
            if id(factor) in stepped:
                raise ValueError(
                    f"peft.optimizers.{function} is for factors that are matrices, but those of {path} are stacks, "
                    f"{tuple(factor.shape)}. This step changed nothing. Use an optimizer of single values, such as "
                    "torch.optim.AdamW or create_loraplus_optimizer, or adapt linear layers only. "
                    "create_lorafa_optimizer has frozen A: model.set_requires_grad(adapter_name) undoes that."
                )


def _expert_factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, layer in model.named_modules():
        if isinstance(layer, ExpertsLora):
            for adapter_name in layer.lora_A:
                yield from ((path, factor) for factor in layer.factors(adapter_name))
