"""Casts of factors that many products share, made once as long as nothing trains the factors: for a generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


class HeldCasts:
    """Copies of parameters in the dtype of a product, at addresses that a CUDA graph can read.

    Within `active()`, `cast_factor` returns these copies and adds missing ones. Copies follow their parameters by
    `refresh()` only.
    """

    def __init__(self) -> None:
        self._copies = WeakTensorKeyDictionary()

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def cast(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        copy = self._copies.get(parameter)
        if copy is not None and copy.dtype == dtype:
            return copy
        with torch.inference_mode(False), torch.no_grad():  # inference tensors can't be written to outside of it
            copy = parameter.to(dtype)
        # the memory of a capture is that of its temporary tensors too, so such a cast is replayed instead
        if not (parameter.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._copies[parameter] = copy
        return copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts all parameters again, in a few launches."""
        if self._copies:
            parameters, copies = zip(*self._copies.items())
            torch._foreach_copy_(list(copies), [parameter.detach() for parameter in parameters])


_ACTIVE: ContextVar[HeldCasts | None] = ContextVar("held_casts", default=None)


def cast_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in the dtype of a product: itself, a copy that is held, or a new one."""
    if factor.dtype == dtype:
        return factor
    held = _ACTIVE.get()
    if held is None or not isinstance(factor, nn.Parameter) or torch.is_grad_enabled():
        return factor.to(dtype)
    return held.cast(factor, dtype)
