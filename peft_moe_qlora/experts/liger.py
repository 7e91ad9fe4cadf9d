"""Removes Liger's forward from experts modules of this package."""

from __future__ import annotations

from types import MethodType

from torch import nn

from ..ops import log_once

WITHOUT_LIGER = "liger_kernel_config={'swiglu': False}"
"""Argument of TrainingArguments that disables Liger for experts."""


def keep_own_forward(experts: nn.Module, class_name: str) -> None:
    """Restores the forward of a module that Liger has overridden on the instance, as it does when Trainer starts.

    Liger writes its forward for 16-bit stacks to the instance's `__dict__`. A hook of accelerate, which Liger may have
    overwritten or wrapped, is added again around the forward of the class.

    Args:
        experts: the module.
        class_name: name of the original experts class, for the log.
    """
    if not getattr(experts.__dict__.get("forward"), "__qualname__", "").startswith("Liger"):
        return
    for name in ("forward", "_get_name"):
        experts.__dict__.pop(name, None)
    hook = experts.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        experts._old_forward = MethodType(type(experts).forward, experts)
        add_hook_to_module(experts, hook)
    log_once(
        f"Liger's kernel for experts is disabled for {class_name}: its weights may be packed and adapted, and "
        "peft_moe_qlora computes them. Liger's other kernels stay enabled."
    )
