"""The dtype of trainable parameters, which trainers may have cast to 16 bits."""

from __future__ import annotations

import torch
from torch import nn

from ..sharded import sharded_by


def cast_trainable_to_fp32(model: nn.Module) -> None:
    """Casts trainable parameters in 16 bits back to fp32; call it between the construction of a trainer and `train()`.

    TRL's trainers cast the trainable parameters of a 4-bit model to bf16, in which updates below 1/256 of a value are
    lost. The cast restores the dtype, not digits that were rounded. Frozen parameters do not change.

    Args:
        model: a model with an adapter, or any other; changed in place.

    Raises:
        ValueError: a parameter is sharded over processes. No parameter is changed then.
    """
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16)
    }
    for name, parameter in found.items():
        engine = sharded_by(parameter)
        if engine is not None:
            raise ValueError(
                f"{name} is sharded over processes by {engine}, which has allocated its buffers in {parameter.dtype}. "
                "Call cast_trainable_to_fp32 before the model is sharded, that is, before train()."
            )
    for parameter in found.values():
        parameter.data = parameter.data.float()
