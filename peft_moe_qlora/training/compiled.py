"""The forward of a decoder layer, compiled once for all layers with the same structure.

The layer is an argument of the compiled function, so modules with the same structure share code. torch keeps at most 8
compiled variants of a code object, so each combination of modes has a separate code object.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import nn

from .hooks import kind_of_hooks, modules_with_hooks

Function = Callable[..., Any]

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
"""Names of the KV cache among the arguments of decoder layers in transformers."""


class compiled_forward:
    """The forward of a layer, compiled with `torch.compile`.

    The first call compiles it for one sequence length; the first call with another length compiles it for all lengths.
    All layers with the same class and structure share the compiled code, in all models. There are separate variants
    with and without gradients, in training and evaluation, for another dtype under autocast, for other active
    adapters, and with the hooks of transformers.

    A call with a KV cache is not compiled, since caches differ by layer and by step, nor is a layer whose modules have
    other hooks. A call inside of another compilation is not compiled separately, for example when transformers
    compiles decoding with a static cache.

    Args:
        layer: a decoder layer whose forward takes hidden states first, and which is not checkpointed by transformers
            (`layer.gradient_checkpointing` is False).
        backend: backend of `torch.compile`.
        retains_graph: compile for backwards in `saved_tensors_kept`.
    """

    def __init__(self, layer: nn.Module, backend: str | Callable = "inductor", retains_graph: bool = False) -> None:
        self.layer = layer
        self._plain = type(layer).forward
        self._backend = backend
        self._retains_graph = retains_graph
        self._structure = f"{type(layer).__qualname__}_{zlib.crc32(repr(layer).encode()):x}"

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or any(kwargs.get(name) is not None for name in CACHES):
            return self._plain(self.layer, hidden_states, *args, **kwargs)
        if not torch.is_grad_enabled():
            hidden_states = hidden_states.detach()  # `requires_grad` would cause an unnecessary recompilation
        has_mask = kwargs.get("attention_mask") is not None
        # torch does not check whether hooks were added or removed since the compilation
        hooked = modules_with_hooks(self.layer)
        kinds = [kind for kind in map(kind_of_hooks, hooked) if kind]
        if kinds:
            name = type(self.layer).__name__
            warnings.warn(f"{name} runs uncompiled: a module in it has a {kinds[0]} hook.", stacklevel=2)
            return self._plain(self.layer, hidden_states, *args, **kwargs)
        # with those of transformers, which record router logits
        way = (torch.is_grad_enabled(), hidden_states.requires_grad, self.layer.training, has_mask, bool(hooked))
        function = _compiled(self._plain, self._structure, self._backend, (*way, self._retains_graph))
        with saved_tensors_kept() if self._retains_graph else nullcontext():
            return function(self.layer, hidden_states, *args, **kwargs)


def saved_tensors_kept() -> AbstractContextManager:
    """Context of compilations and backwards with `retain_graph=True`: they do not overwrite saved activations.

    Otherwise, torch raises an error in such backwards.
    """
    return functorch_config.patch(donated_buffer=False)


@cache
def _compiled(plain: Function, structure: str, backend: str | Callable, way: tuple[bool, ...]) -> Function:
    """`plain` with a separate code object; variants of a structure share its name and thus the dynamic sizes."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    code = forward.__code__.replace(co_name=structure)
    copy = FunctionType(code, forward.__globals__, structure, closure=forward.__closure__)
    return torch.compile(copy, backend=backend)
