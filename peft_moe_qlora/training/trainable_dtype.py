"""The dtype of trainable factors, which trainers may have cast to 16 bits."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..sharded import sharded_by


def cast_trainable_to_fp32(model: nn.Module) -> None:
    """Casts trainable factors in 16 bits back to fp32; call it between the construction of a trainer and `train()`.

    TRL's trainers cast the trainable parameters of a 4-bit model to bf16, in which updates below 1/256 of a value are
    lost. The cast restores the dtype, not digits that were rounded.

    Only parameters of adapter layers are cast, which cast their inputs. Modules trained in full, such as a head in
    `modules_to_save`, keep their dtype, as in PEFT: in fp32 they would not take the activations of a 16-bit base.
    Frozen parameters do not change.

    Args:
        model: a model with an adapter; changed in place.

    Raises:
        ValueError: a parameter is sharded over processes, or already has a gradient, so that training has begun. No
            parameter is changed then.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    found = {
        f"{prefix}.{name}": parameter
        for prefix, layer in layers
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16)
    }
    for name, parameter in found.items():
        engine = sharded_by(parameter)
        if engine is not None:
            raise ValueError(
                f"{name} is sharded over processes by {engine}, which has allocated its buffers in {parameter.dtype}. "
                "Call cast_trainable_to_fp32 before the model is sharded, that is, before train()."
            )
        if parameter.grad is not None:
            raise ValueError(
                f"{name} has a gradient in {parameter.dtype}, so the optimizer's states may be in it too. Call "
                "cast_trainable_to_fp32 before the first step, that is, before train()."
            )
    for parameter in found.values():
        parameter.data = parameter.data.float()
