"""A decoder layer's forward, compiled once for all layers of a kind.

The layer is an argument of the compiled function: modules of equal structure share code, whatever their weights.
torch keeps at most 8 compiled variants of a code object, so each way of running has a code object of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn

Function = Callable[..., Any]

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
"""Names that transformers has for the cache of keys and values."""


class compiled_forward:
    """The forward of a layer's class, compiled by `torch.compile` where it pays, bound to the layer.

    It is compiled at the first call, for one length of sequences; at the first other length it is compiled again, for
    all lengths. All layers of the same class and structure share that, in all models. Each Python
    control flow is compiled separately: with and without gradients, training and evaluation, another dtype under
    autocast, other active adapters.

    A call with a KV cache is not compiled, since caches differ by layer and by step. Nor is a call that is being
    compiled from outside, as when transformers compiles decoding with a static cache.

    Args:
        layer: a decoder layer whose forward takes hidden states first, and which is not checkpointed by transformers
            (`layer.gradient_checkpointing` is False).
        backend: of `torch.compile`.
    """

    def __init__(self, layer: nn.Module, backend: str | Callable = "inductor") -> None:
        self.layer = layer
        self._plain = type(layer).forward
        self._backend = backend
        self._structure = f"{type(layer).__qualname__}_{zlib.crc32(repr(layer).encode()):x}"

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or any(kwargs.get(name) is not None for name in CACHES):
            return self._plain(self.layer, hidden_states, *args, **kwargs)
        if not torch.is_grad_enabled():
            hidden_states = hidden_states.detach()  # `requires_grad` would cause a needless recompilation
        has_mask = kwargs.get("attention_mask") is not None
        way = (torch.is_grad_enabled(), hidden_states.requires_grad, self.layer.training, has_mask)
        return _compiled(self._plain, self._structure, self._backend, way)(self.layer, hidden_states, *args, **kwargs)


@cache
def _compiled(plain: Function, structure: str, backend: str | Callable, way: tuple[bool, ...]) -> Function:
    """`plain` with its own code object, whose name lets all variants of a structure share which sizes are dynamic."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    code = forward.__code__.replace(co_name=structure)
    copy = FunctionType(code, forward.__globals__, structure, closure=forward.__closure__)
    return torch.compile(copy, backend=backend)
