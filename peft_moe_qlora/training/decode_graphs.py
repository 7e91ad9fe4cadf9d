"""A CUDA graph of one decoding step with a static cache, for generation during training.

A step of one token launches thousands of kernels and is launch-bound. With
`generate(cache_implementation="static", disable_compile=True)` one step is captured per prompt, and later ones replay
it. For each batch size and cache length, the first step runs without a graph, as a warm-up. Compiling such a step
takes minutes, capturing it takes as long as a step.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import Counter, deque
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from ..ops import HeldCasts
from .compiled import CACHES
from .cuda_graphs import (
    Backend,
    CudaBackend,
    Function,
    autocast_state,
    flatten,
    uncached_autocast,
    why_not_constant,
)
from .layer_graphs import adapter_attributes, layer_state, own_forward, why_not_captured
from .static_tensors import StaticTensors

_RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")

MOST_WARM = 8
"""Limit on the remembered warm-up steps, one for each batch size, cache length and state of the adapters."""

MOST_UNUSED = 4
"""Limit on captures in a row that are not replayed again; from then on, a step is captured when it recurs."""

UNUSED = f"{MOST_UNUSED} captured steps were not used again, as with two caches in turns"
REPLACED = "the tensors of the cache are replaced between steps, as in beam search"


class DecodeRunner:
    """Replaces the `forward` of a model's stack of decoder layers.

    Only steps of one token with a static cache, in evaluation mode and without gradients, are captured. Factors of
    linear layers are cast once per prompt.

    Args:
        decoder: the stack, `model.get_decoder()`.
        make_backend: class of the backend for the capture.
    """

    def __init__(self, decoder: nn.Module, make_backend: type[Backend] = CudaBackend) -> None:
        self.decoder = decoder
        self.reasons: Counter[str] = Counter()
        self._make_backend = make_backend
        self._own_forward = own_forward(decoder)
        self._lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Frees the graph and its memory."""
        self._step: CapturedStep | None = None
        self._last: tuple | None = None
        self._reason: str | None = None
        self._is_after_prompt = True
        self._unused = 0
        self._warm: deque[tuple] = deque(maxlen=MOST_WARM)
        self._casts = HeldCasts()
        self._backends: dict[torch.device, Backend] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._plain(*args, **kwargs)
        cache_name = next((name for name in CACHES if kwargs.get(name) is not None), None)
        if not self._is_step(args, kwargs, kwargs.get(cache_name)):
            self._is_after_prompt, self._last, self._reason = True, None, None
            return self._plain(*args, **kwargs)
        with self._lock:  # threads share the step and its buffers
            return self._run_step(cache_name, kwargs)

    def _run_step(self, cache_name: str, kwargs: dict[str, Any]) -> Any:
        plain, cache = self._plain, kwargs[cache_name]
        leaves, spec = flatten({name: value for name, value in kwargs.items() if name not in CACHES})
        attention = self.decoder.config._attn_implementation
        key = (spec, *_signature(leaves), attention, *autocast_state().items())
        is_after_prompt, self._is_after_prompt = self._is_after_prompt, False
        if self._step is not None and self._step.is_before_other_tokens(cache):
            is_after_prompt = True  # a prompt of one token, after a reset
        if self._step is not None and not self._step.fits(key, cache, is_after_prompt):
            if not is_after_prompt and self._step.has_other_tensors(cache):
                self._reason = REPLACED  # they would be in the next step, too
            self._unused = 0 if self._step.replays > 1 else self._unused + 1
            self._step = None
        if self._casts.has_new_factors() or is_after_prompt:
            self._casts.refresh()  # factors may have been trained since the last generation
        if self._step is None:
            if self._last != (key, id(cache)):
                self._last, self._reason = (key, id(cache)), None
                has_unused = self._unused >= MOST_UNUSED
                if has_unused:
                    self.reasons[UNUSED] += 1
                if not self._is_warm(key, cache) or has_unused:
                    with self._casts.active():
                        return plain(**kwargs)
            self._capture(plain, key, leaves, cache_name, cache)
        if self._step is None:
            self.reasons[self._reason] += 1
            return plain(**kwargs)
        return self._step(leaves, cache)

    @property
    def _plain(self) -> Function:
        # torch.compile of a whole model cannot trace MethodType
        return self._own_forward or partial(type(self.decoder).forward, self.decoder)

    def _is_warm(self, key: tuple, cache: StaticCache) -> bool:
        """Whether such a step has run before; the first one loads and compiles kernels, which a capture cannot do."""
        lengths = {getattr(layer, "max_cache_len", None) for layer in cache.layers}
        step = (key, lengths, layer_state(self.decoder))
        is_warm = step in self._warm
        if not is_warm:
            self._warm.append(step)
        return is_warm

    def _capture(self, plain: Function, key: tuple, leaves: list[Any], name: str, cache: StaticCache) -> None:
        """Captures a step, or records the reason why not; a failed capture is not retried before the next prompt."""
        if self._reason is not None:
            return
        others = (leaf for leaf in leaves if not isinstance(leaf, Tensor))
        self._reason = why_not_constant(others) or _why_not(self.decoder, cache)
        if self._reason is None:
            device = self.decoder.device
            try:
                if device not in self._backends:
                    self._backends[device] = self._make_backend(device)
                backend = self._backends[device]
                self._step = CapturedStep(plain, self.decoder, key, leaves, name, cache, backend, self._casts)
            except RuntimeError as error:
                # CUDA errors; nothing has run, so the cache is unchanged
                self._reason = f"the capture failed: {error}"

    def _is_step(self, args: tuple, kwargs: dict[str, Any], cache: Any) -> bool:
        returns_tuple = kwargs.get("return_dict", self.decoder.config.return_dict) is False
        if args or returns_tuple or self.decoder.training or torch.is_grad_enabled():
            return False
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        is_recorded = any(kwargs.get(name) or getattr(self.decoder.config, name, False) for name in _RECORDED)
        return (
            isinstance(cache, StaticCache)
            and not is_recorded
            and isinstance(tokens, Tensor)
            and tokens.shape[1] == 1
            and tokens.device.type == self._make_backend.device_type
            and any(layer.is_initialized for layer in cache.layers)
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._plain)

    def report(self) -> list[str]:
        """Lists the captured step, and the reasons for steps without a graph."""
        lines = [] if self._step is None else [f"a step of decoding, replayed {self._step.replays} times"]
        return lines + [f"decoding without a graph, {count} steps: {why}" for why, count in self.reasons.items()]

    def __getstate__(self) -> dict[str, Any]:
        copy = {**self.__dict__, "_step": None, "_last": None, "_backends": {}, "_lock": None}
        return {**copy, "_warm": deque(maxlen=MOST_WARM), "_casts": HeldCasts()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


class CapturedStep:
    """The graph of one step for one cache, whose tensors it reads and writes.

    Args:
        plain: forward of the stack of layers.
        decoder: the stack.
        key: signature that the arguments must match.
        leaves: leaves of the arguments.
        cache_name: name of the cache among the arguments.
        cache: the KV cache; only a weak reference is kept, so it is freed as without a graph.
        backend: backend for the capture.
        casts: copies of factors that the graph reads.
    """

    def __init__(
        self,
        plain: Function,
        decoder: nn.Module,
        key: tuple,
        leaves: list[Any],
        cache_name: str,
        cache: StaticCache,
        backend: Backend,
        casts: HeldCasts,
    ) -> None:
        self.replays = 0
        self._key = key
        self._cache = weakref.ref(cache)
        self._cache_name = cache_name
        self._decoder = decoder
        self._addresses = _addresses(cache)
        self._state = layer_state(decoder)
        kinds = (LoraLayer, AuxiliaryTrainingWrapper)
        self._adapters = [module for module in decoder.modules() if isinstance(module, kinds)]
        self._adapter_states = deepcopy([adapter_attributes(module) for module in self._adapters])
        bases = [module.get_base_layer() for module in self._adapters if isinstance(module, LoraLayer)]
        self._weights = [(base._parameters, *item) for base in bases for item in base._parameters.items()]
        self._static = StaticTensors()
        spec = key[0]
        inputs = tree_unflatten(self._load(leaves), spec)
        self._output: dict[str, Any] = {}
        self._output_type: type | None = None
        autocast = autocast_state()

        def work() -> None:
            with casts.active(), uncached_autocast(autocast):
                output = plain(**inputs, **{cache_name: self._cache()})
            self._output_type = type(output)
            # the output must not hold a reference to the cache
            self._output = {name: value for name, value in output.items() if value is not self._cache()}

        self._graph = backend.capture(work)
        self._version = _version(cache)

    def fits(self, key: tuple, cache: StaticCache, is_after_prompt: bool) -> bool:
        """Whether the step can be replayed; parameters are checked once per prompt."""
        return (
            self._key == key
            and self._cache() is cache
            and not self.has_other_tensors(cache)
            and self._adapter_states == [adapter_attributes(module) for module in self._adapters]
            # merging and unmerging replaces 4-bit weights
            and all(parameters.get(name) is weight for parameters, name, weight in self._weights)
            and (not is_after_prompt or self._state == layer_state(self._decoder))
        )

    def has_other_tensors(self, cache: StaticCache) -> bool:
        """Whether the captured cache has other tensors than those in the graph."""
        return self._cache() is cache and self._addresses != _addresses(cache)

    def is_before_other_tokens(self, cache: StaticCache) -> bool:
        """Whether the cache has changed since the last replay: reset, cropped, or filled without the graph."""
        return self._cache() is cache and self._version != _version(cache)

    def __call__(self, leaves: list[Any], cache: StaticCache) -> Any:
        self._load(leaves)
        self._graph.replay()
        self.replays += 1
        self._version = _version(cache)
        output = {name: value.clone() if isinstance(value, Tensor) else value for name, value in self._output.items()}
        return self._output_type(**output, **{self._cache_name: cache})

    def _load(self, leaves: list[Any]) -> list[Any]:
        return [
            self._static.load(number, leaf) if isinstance(leaf, Tensor) else leaf for number, leaf in enumerate(leaves)
        ]


def _signature(leaves: list[Any]) -> list[Any]:
    return [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _addresses(cache: StaticCache) -> list[int]:
    values = (value for layer in cache.layers for value in vars(layer).values())
    return [value.data_ptr() for value in values if isinstance(value, Tensor)]


def _version(cache: StaticCache) -> int | None:
    """A number that changes with the contents of a cache, except by replays; None for a cache of inference mode."""
    length = cache.layers[0].cumulative_length
    return None if length.is_inference() else length._version


def _why_not(decoder: nn.Module, cache: StaticCache) -> str | None:
    """The reason why a step cannot be captured; None if it can."""
    if cache.offloading:
        return "the cache is offloaded to the CPU"
    for layer in cache.layers:
        if type(layer) is not StaticLayer:
            return f"{type(layer).__name__} counts tokens on the host"
        if not layer.is_initialized:
            return "a layer of the cache has no keys and values"
    return why_not_captured(decoder)
