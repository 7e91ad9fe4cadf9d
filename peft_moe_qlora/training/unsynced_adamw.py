"""bitsandbytes' 8-bit AdamW without synchronizing between launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bitsandbytes.optim import AdamW8bit
from bitsandbytes.utils import sync_gpu
from torch.distributed.tensor import DTensor


class UnsyncedAdamW8bit(AdamW8bit):
    """bitsandbytes' AdamW8bit without its GPU synchronization after each parameter; paged, it waits once per step.

    States and updates are bit-identical to the parent's; arguments are the same. Pass it to Trainer as
    `optimizer_cls_and_kwargs=(UnsyncedAdamW8bit, {"lr": 1e-4})`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Updates all parameters with a gradient; calls the closure first and returns its result.

        Raises:
            ValueError: parameters are sharded over processes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self._refuse_sharded()
            self.to_gpu()
            self.initialized = True
        updated = None
        for group_number, group in enumerate(self.param_groups):
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.init_state(group, parameter, group_number, number)
                    self.prefetch_state(parameter)
                    self.update_step(group, parameter, group_number, number)
                    updated = parameter
        if self.is_paged and updated is not None:
            sync_gpu(updated)  # the host may read paged states next
        return loss

    def _refuse_sharded(self) -> None:
        if any(isinstance(parameter, DTensor) for group in self.param_groups for parameter in group["params"]):
            raise ValueError(
                f"{type(self).__name__} does not support parameters that are sharded over processes (FSDP2), nor does "
                "any optimizer of bitsandbytes. Use torch.optim.AdamW, which shards its states too."
            )
