"""Keeps casts of LoRA factors, so that a generation casts each factor only once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


class HeldCasts:
    """Copies of parameters in the dtype of a product, at fixed addresses that a CUDA graph can read.

    Within `active()`, `cast_factor` returns these copies and adds missing ones. Only `refresh()` updates the copies
    after a change of their parameters.
    """

    def __init__(self) -> None:
        self._copies = WeakTensorKeyDictionary()
        self._versioned: list[weakref.ref[nn.Parameter]] = []
        self._version = 0

    def __reduce__(self) -> tuple:
        return type(self), ()  # copies have none, since they belong to the parameters of one model

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
        with torch.inference_mode(False), torch.no_grad():  # inference tensors are read-only outside of inference mode
            copy = parameter.to(dtype)
        # temporary tensors reuse the memory of a capture, so a cast in a capture is replayed instead of kept
        if not (parameter.is_cuda and torch.cuda.is_current_stream_capturing()):
            if parameter not in self._copies and not parameter.is_inference():  # inference tensors have no version
                self._versioned.append(weakref.ref(parameter))
            self._copies[parameter] = copy
        return copy

    def has_new_factors(self) -> bool:
        """Whether parameters have changed in place, or have got their first copies, since the last call."""
        before = self._version
        parameters = [reference() for reference in self._versioned]
        self._version = sum([parameter._version + 1 for parameter in parameters if parameter is not None])
        return before != self._version

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts all parameters again, in few launches. Drops copies of parameters that were moved or reshaped."""
        for parameter, copy in list(self._copies.items()):
            if (parameter.device, parameter.shape) != (copy.device, copy.shape):
                del self._copies[parameter]
                self._versioned = [one for one in self._versioned if one() is not parameter]
        if self._copies:
            parameters, copies = zip(*self._copies.items())
            torch._foreach_copy_(list(copies), [parameter.detach() for parameter in parameters])


_ACTIVE: ContextVar[HeldCasts | None] = ContextVar("held_casts", default=None)


def cast_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor in the dtype of a product: unchanged, a held copy, or a new copy."""
    if factor.dtype == dtype:
        return factor
    # torch.compile of torch 2.11 cannot trace a ContextVar
    held = None if torch.compiler.is_compiling() else _ACTIVE.get()
    if held is None or not isinstance(factor, nn.Parameter) or torch.is_grad_enabled():
        return factor.to(dtype)
    return held.cast(factor, dtype)
