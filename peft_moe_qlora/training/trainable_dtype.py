"""The dtype of trainable parameters, which trainers may have cast to 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..experts import QuantizedExperts
from ..sharded import sharded_by


def cast_trainable_to_fp32(model: nn.Module) -> None:
    """Casts trained factors in 16 bits back to fp32; call it between the construction of a trainer and `train()`.

    TRL's trainers cast the trainable parameters of a 4-bit model to bf16, in which updates below 1/256 of a value are
    lost. The cast restores the dtype, not digits that were rounded.

    Modules trained in full, such as a head in `modules_to_save`, get the dtype of the module that they replace, and
    trained biases of the base model that of its weights: unlike adapter layers, they do not cast their inputs, which
    have that dtype. Frozen parameters do not change.

    Args:
        model: a model with an adapter; changed in place.

    Raises:
        ValueError: a parameter is sharded over processes, or already has a gradient, so that training has begun. No
            parameter is changed then.
    """
    found = {name: parameter for name, parameter, dtype in _trained(model) if _is_rounded(parameter, dtype)}
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


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.dtype]]:
    """Parameters of adapter layers, of modules trained in full, and biases; and the dtype to train them in."""
    for prefix, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for name, parameter in module.named_parameters():
                if not name.startswith("base_layer."):
                    yield f"{prefix}.{name}", parameter, torch.float32
        elif isinstance(module, ModulesToSaveWrapper):
            originals = dict(module.original_module.named_parameters())
            for adapter, copy in module.modules_to_save.items():
                for name, parameter in copy.named_parameters():
                    dtype = originals[name].dtype if name in originals else parameter.dtype
                    yield f"{prefix}.modules_to_save.{adapter}.{name}", parameter, dtype
        elif isinstance(module, QuantizedExperts):
            for name, bias in module.named_parameters(recurse=False):
                yield f"{prefix}.{name}", bias, module.stack(module.layout.up_name).dtype
        elif isinstance(module._parameters.get("bias"), nn.Parameter) and "weight" in module._parameters:
            yield f"{prefix}.bias", module.bias, module.weight.dtype


def _is_rounded(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    is_16_bit = parameter.dtype in (torch.float16, torch.bfloat16)
    return parameter.requires_grad and is_16_bit and dtype == torch.float32
