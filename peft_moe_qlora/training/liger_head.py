"""Rejects Liger's fused linear cross entropy where it would bypass parts of the model."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_REMEDY = "liger_kernel_config={'fused_linear_cross_entropy': False}"


def refuse_liger_head(model: nn.Module) -> None:
    """Rejects models for which Liger's fused loss would be wrong, if it has replaced the model's forward.

    In training, Liger's loss multiplies hidden states by `lm_head.weight` and does not call `lm_head`.

    Args:
        model: the base model, with its adapters.

    Raises:
        ValueError: there is no `lm_head`, it has an adapter, or its weight is packed.
    """
    forward = model.__dict__.get("forward", type(model).forward)
    if not getattr(forward, "__module__", "").startswith("liger_kernel."):
        return
    reason = _why_not(model.lm_head) if hasattr(model, "lm_head") else "has no lm_head"
    if reason is not None:
        raise ValueError(
            f"Liger's fused linear cross entropy has replaced the forward of {type(model).__name__}, which {reason}. "
            f"Load the model again, and train it with use_liger_kernel=True and {_REMEDY}."
        )


def _why_not(head: nn.Module) -> str | None:
    if isinstance(head, BaseTunerLayer):
        return "has an adapter on lm_head, which Liger ignores and does not train"
    weight = head._parameters.get("weight")  # None if computed, for trainable tokens and quantized layers
    if weight is not None and (not weight.is_floating_point() or weight.shape[-1] != head.in_features):
        return f"has a packed lm_head ({type(head).__name__}, {tuple(weight.shape)}, {weight.dtype})"
    return None
