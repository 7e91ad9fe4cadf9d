"""The captured decoder layers of a model: when a layer is captured, when its graphs fit, and why there are none."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..experts import QuantizedExperts
from ..ops import choose_library_path
from ..sharded import engine_of
from .cuda_graphs import (
    Backend,
    Call,
    CapturedLayer,
    CudaBackend,
    Function,
    autocast_state,
    read_call,
    why_not_constant,
)
from .static_tensors import StaticTensors

logger = logging.getLogger(__name__)

MOST_SHAPES = 8
"""Shapes of inputs that are captured in a model; each takes seconds, and memory."""

NO_ROOM = (
    "the GPU has no room for graphs ({}); all were freed. Fewer tokens in a batch, a lower rank or an optimizer in 8 "
    "bits make room"
)

MOST_CAPTURES = 8
"""Of one layer for one shape: for adapters that take turns, and for parameters that were moved."""


class LayerGraphs:
    """The captured decoder layers of a model.

    An input shape is captured layer by layer on its second occurrence; the first warms up compilation, loading and
    autotuning. What can't be captured runs without a graph; `report` says why.

    Args:
        keep: what the forward keeps for the backward; see `CapturedLayer`.
        make_backend: what captures on a device.
    """

    def __init__(self, keep: str = "nothing", make_backend: type[Backend] = CudaBackend) -> None:
        self.keep = keep
        self.is_paused: str | None = None
        """Why no layer runs from a graph in this forward; None if they do."""
        self._make_backend = make_backend
        self.forget()

    def forget(self) -> None:
        """Frees all graphs and their memory; layers are recaptured when their shapes recur."""
        self.reasons: Counter[str] = Counter()
        self._no_room: str | None = None
        self._static = StaticTensors()
        self._backend: Backend | None = None
        self._captured: dict[tuple, CapturedLayer | str] = {}
        self._captures: dict[tuple, int] = {}
        self._shapes: set[tuple] = set()

    def run(self, layer: nn.Module, function: Function, plain: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs a layer from its graphs, or without.

        Args:
            layer: the decoder layer.
            function: its forward, to be captured.
            plain: what runs it without graphs.
            args: of the forward.
            kwargs: of the forward.
        """
        call = read_call(args, kwargs)
        found = self.is_paused or self._why_no_call(call) or self._find(layer, function, call)
        if isinstance(found, CapturedLayer):
            return found(call)
        if found is not None:
            if found not in self.reasons:
                logger.warning("%s runs without a CUDA graph: %s.", type(layer).__name__, found)
            self.reasons[found] += 1
        return plain(*args, **kwargs)

    def _why_no_call(self, call: Call) -> str | None:
        """Why these arguments can't be those of a graph."""
        if not isinstance(call.hidden_states, Tensor):
            return f"its first argument is a {type(call.hidden_states).__name__}, not hidden states"
        device_type = call.hidden_states.device.type
        if device_type != self._make_backend.device_type:
            return f"it is on {device_type}, not on {self._make_backend.device_type}"
        if any(tensor.requires_grad for tensor in call.tensors):
            return "gradients are wanted for another argument than the hidden states"
        return why_not_constant(call.rest)

    def _find(self, layer: nn.Module, function: Function, call: Call) -> CapturedLayer | str | None:
        """A captured layer, why there is none, or None where this call only warms up."""
        if self._no_room is not None:
            return self._no_room
        inputs = (call.signature, *autocast_state().items())
        of_layer = (id(layer), inputs)
        key = (*of_layer, layer_state(layer))
        if key in self._captured:
            return self._captured[key]
        if of_layer not in self._captures:
            self._captures[of_layer] = 0
            return None
        if inputs not in self._shapes and len(self._shapes) == MOST_SHAPES:
            return f"{MOST_SHAPES} shapes of inputs are captured; pad or pack sequences to few lengths"
        if self._captures[of_layer] == MOST_CAPTURES:
            return "its parameters have moved or its adapters have changed too often"
        found = why_not_captured(layer)
        if found is None:
            try:
                found = self._capture(layer, function, call)
                no_room = self._backend.why_no_room()
            except torch.OutOfMemoryError:
                no_room = "a capture ran out of memory"
            if no_room is not None:
                # the graphs take memory that plain layers need
                self.forget()
                self._no_room = NO_ROOM.format(no_room)
                return self._no_room
        self._shapes.add(inputs)
        self._captures[of_layer] += 1
        self._captured[key] = found
        return found

    def _capture(self, layer: nn.Module, function: Function, call: Call) -> CapturedLayer | str:
        """Raises:
        torch.OutOfMemoryError: the GPU has no room for the graphs.
        """
        if self._backend is None:
            self._backend = self._make_backend(call.hidden_states.device)
        try:
            return CapturedLayer(function, layer, call, self._static, self._backend, self.keep)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            # CUDA errors are raised as RuntimeError
            return f"the capture failed: {error}"

    def report(self) -> list[str]:
        """What is captured, and why something is not."""
        captured = sum(isinstance(found, CapturedLayer) for found in self._captured.values())
        lines = [f"{captured} graphs of layers, for {len(self._shapes)} shapes of inputs"]
        return lines + [f"without a graph, {count} times: {reason}" for reason, count in self.reasons.items()]

    def __reduce__(self) -> tuple:
        # a copy of the model captures its own
        return LayerGraphs, (self.keep, self._make_backend)


def why_sequences_are_split(config: PreTrainedConfig) -> str | None:
    """Why no layer of a model can be captured while processes share its sequences; None if they don't.

    Their attention then sends parts of a sequence around, with buffers that it makes at each call. Both engines put
    functions of their own in the place of transformers' and torch's, for as long as they are at work.
    """
    attention = ALL_ATTENTION_FUNCTIONS.get(config.get_text_config()._attn_implementation)
    of_engines = {
        "DeepSpeed's Ulysses": (attention, "deepspeed."),
        "torch's context parallelism": (nn.functional.scaled_dot_product_attention, "torch.distributed."),
    }
    for engine, (function, module) in of_engines.items():
        if (getattr(function, "__module__", None) or "").startswith(module):
            return f"its attention exchanges parts of sequences between processes ({engine})"
    return None


def why_not_captured(layer: nn.Module) -> str | None:
    """Why what a layer, or all of them, launch can't be captured."""
    engine = engine_of(layer)
    if engine is not None:  # it frees parameters that a graph would read, and gathers them at other addresses
        return f"its parameters are sharded by {engine}"
    for path, module in layer.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"accelerate moves its weights ({path or 'the layer itself'})"
        hooks = [hook for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()]
        # those of transformers let inputs require gradients, and record outputs, for which graphs are paused
        if path and any(not hook.__module__.startswith("transformers.") for hook in hooks):
            return f"{path} has a forward hook, which a graph would not call"
        if isinstance(module, QuantizedExperts):
            reason = _why_experts_copy(module)
            if reason is not None:
                return f"its experts are computed one by one, {reason}"
    return None


def _why_experts_copy(experts: QuantizedExperts) -> str | None:
    """Why experts copy numbers of rows to the host, which a capture can't; None if they don't."""
    stack, path = experts.stack(experts.layout.up_name), experts.compute_path(experts.layout.up_name)
    if stack.device.type != "cuda" or path.name == "fused":
        return None
    # what is not fused takes the library's path for its low-rank terms
    paths = (path, choose_library_path(stack.device, stack.dtype, stack.in_features, stack.out_features, path.reason))
    return next((one.reason for one in paths if one.name == "loop"), None)


def layer_state(layer: nn.Module) -> tuple:
    """What a graph assumes: the addresses of parameters, which are trained, and the state of adapters."""
    state: list[Any] = []
    left = [layer]
    while left:  # `parameters()` and `modules()` would take longer than a replay
        module = left.pop()
        for parameter in module._parameters.values():
            if parameter is not None:
                state += (parameter.data_ptr(), parameter.requires_grad)
        if isinstance(module, LoraLayer):
            state += (*module.active_adapters, *module.merged_adapters, module.disable_adapters)
            state += module.scaling.values()
        left += [child for child in module._modules.values() if child is not None]
    return tuple(state)
