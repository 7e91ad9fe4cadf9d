"""Keeps Liger's forward of experts off modules that have a forward of their own."""

from __future__ import annotations

from types import MethodType

from torch import nn

from ..ops import log_once

WITHOUT_LIGER = "liger_kernel_config={'swiglu': False}"
"""What to give to a Trainer beside `use_liger_kernel`, to keep Liger off experts."""


def keep_own_forward(experts: nn.Module, class_name: str) -> None:
    """Takes off what Liger has written over the forward of an instance, as it does when a Trainer starts.

    Liger binds its forward for 16-bit stacks past `setattr`, in the instance's `__dict__`. A hook of accelerate's,
    which it has written over or which was put around it, is put around the class's own forward.

    Args:
        experts: a module whose class has a `forward` that is meant to run.
        class_name: of the experts that it stands for, for the log.
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
        f"Liger's kernel for experts is left out of {class_name}: these weights may be packed and adapted, and are "
        "computed by peft_moe_qlora. Liger's other kernels stay in effect."
    )
