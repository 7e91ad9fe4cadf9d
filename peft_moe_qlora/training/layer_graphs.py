"""Decides when decoder layers of a model are captured in CUDA graphs, and which graph a call can use."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
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
from .hooks import has_hooks, kind_of_hooks
from .static_tensors import StaticTensors

logger = logging.getLogger(__name__)

MOST_SHAPES = 8
"""Limit on the captured input shapes of a layer; each takes seconds and memory."""

NO_ROOM = (
    "the GPU has too little memory for graphs ({}); all were freed. Use fewer tokens per batch, a lower rank or an "
    "8-bit optimizer"
)

MOST_CAPTURES = 8
"""Limit on the captures of a layer for one shape, for switched adapters, changed constants and moved parameters.

Graphs that were replayed until their parameters moved do not count.
"""


class ForwardState(threading.local):
    """State of the forwards of a model in one thread.

    Attributes:
        is_paused: the reason why no graphs are used in this forward; None if they are.
        attention: the implementation of attention in this forward.
        running: the forwards in progress, outermost first, with `is_paused` before them; also those that Ctrl-C ended,
            after which torch does not call forward hooks.
    """

    def __init__(self) -> None:
        self.is_paused: str | None = None
        self.attention: str | None = None
        self.running: list[tuple[nn.Module, str | None]] = []


class LayerGraphs:
    """The captured decoder layers of a model.

    An input shape is captured layer by layer on its second occurrence; the first warms up compilation, loading and
    autotuning. Layers that cannot be captured run without a graph; `report` lists the reasons.

    Args:
        keep: activations that the forward saves; see `CapturedLayer`.
        make_backend: class of the backend for the capture.
    """

    def __init__(self, keep: str = "nothing", make_backend: type[Backend] = CudaBackend) -> None:
        self.keep = keep
        self.now = ForwardState()
        """The forward in progress in this thread."""
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
        self._constants: dict[tuple, set[tuple]] = {}
        self._shapes: dict[int, set[tuple]] = {}
        """id of a layer -> signatures of arguments for which it was captured."""

    def run(self, layer: nn.Module, function: Function, plain: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs a layer with or without its graphs.

        Args:
            layer: the decoder layer.
            function: forward of the layer, to be captured.
            plain: function that runs the layer without graphs.
            args: arguments of the forward.
            kwargs: keyword arguments of the forward.
        """
        call = read_call(args, kwargs)
        found = self.now.is_paused or self._why_no_call(call) or self._find(layer, function, call)
        if isinstance(found, CapturedLayer):
            return found(call)
        if found is not None:
            if found not in self.reasons:
                logger.warning("%s runs without a CUDA graph: %s.", type(layer).__name__, found)
            self.reasons[found] += 1
        return plain(*args, **kwargs)

    def _why_no_call(self, call: Call) -> str | None:
        """The reason why a graph does not support these arguments; None if it does."""
        if not isinstance(call.hidden_states, Tensor):
            return f"its first argument is a {type(call.hidden_states).__name__}, not hidden states"
        device_type = call.hidden_states.device.type
        if device_type != self._make_backend.device_type:
            return f"it is on {device_type}, not on {self._make_backend.device_type}"
        if any(tensor.requires_grad for tensor in call.tensors):
            return "an argument other than the hidden states requires gradients"
        return why_not_constant(call.rest)

    def _find(self, layer: nn.Module, function: Function, call: Call) -> CapturedLayer | str | None:
        """A captured layer, the reason why there is none, or None if this call is the warm-up."""
        if self._no_room is not None:
            return self._no_room
        inputs = (call.signature, self.now.attention, *autocast_state().items())
        of_layer = (id(layer), inputs)
        key = (*of_layer, *layer_state(layer))
        if key in self._captured:
            return self._captured[key]
        self._drop_stale(key)
        if of_layer not in self._captures:
            constants = self._constants.setdefault((id(layer), call.spec, *call.shapes), set())
            if len(constants) == MOST_SHAPES and tuple(call.rest) not in constants:
                return f"arguments that are numbers or strings have had {MOST_SHAPES} values; pass them as tensors"
            constants.add(tuple(call.rest))
            self._captures[of_layer] = 0
            return None
        shapes = self._shapes.setdefault(id(layer), set())
        if inputs not in shapes and len(shapes) == MOST_SHAPES:
            return f"{MOST_SHAPES} input shapes are captured already; pad or pack sequences to fewer lengths"
        if self._captures[of_layer] == MOST_CAPTURES:
            return "its parameters, adapters or constants have changed too often"
        found = why_not_captured(layer)
        if found is None:
            try:
                found = self._capture(layer, function, call)
                no_room = self._backend.why_no_room()
            except torch.OutOfMemoryError:
                no_room = "a capture ran out of memory"
            if no_room is not None:
                # free the graphs, whose memory is needed without them
                self.forget()
                self._no_room = NO_ROOM.format(no_room)
                return self._no_room
        shapes.add(inputs)
        self._captures[of_layer] += 1
        self._captured[key] = found
        return found

    def _drop_stale(self, key: tuple) -> None:
        """Drops graphs of the layer that read parameters at other addresses; they would never be replayed again."""
        for one in [one for one in self._captured if one[0] == key[0] and one[2] != key[2]]:
            found = self._captured.pop(one)
            if isinstance(found, CapturedLayer) and found.was_replayed:
                self._captures[one[:2]] -= 1  # it was worth its time

    def _capture(self, layer: nn.Module, function: Function, call: Call) -> CapturedLayer | str:
        """Captures a layer, or returns the reason why it cannot be captured.

        Raises:
            torch.OutOfMemoryError: the GPU has too little memory for the graphs.
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
        """Lists captured graphs, and the reasons for calls without a graph."""
        captured = sum(isinstance(found, CapturedLayer) for found in self._captured.values())
        shapes = max(map(len, self._shapes.values()), default=0)
        lines = [f"{captured} graphs of layers, for {shapes} input shapes"]
        return lines + [f"without a graph, {count} times: {reason}" for reason, count in self.reasons.items()]

    def __reduce__(self) -> tuple:
        # a copy of the model captures its own graphs
        return LayerGraphs, (self.keep, self._make_backend)


def why_sequences_are_split(config: PreTrainedConfig) -> str | None:
    """The reason why a model with sequence parallelism cannot be captured; None without sequence parallelism.

    Attention then exchanges parts of sequences, with buffers that are allocated in each call. While they are active,
    both engines replace attention functions of transformers and torch, by which they are detected.
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
    """The reason why a layer cannot be captured; None if it can."""
    engine = engine_of(layer)
    if engine is not None:  # frees parameters that a graph reads, and gathers them at other addresses
        return f"its parameters are sharded by {engine}"
    for path, module in layer.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"accelerate moves its weights ({path or 'the layer itself'})"
        kind = kind_of_hooks(module) if path else None
        if kind is not None:
            return f"{path} has a {kind} hook, which a graph does not call"
        if isinstance(module, QuantizedExperts):
            reason = _why_experts_copy(module)
            if reason is not None:
                return f"its experts are computed one at a time: {reason}"
    return None


def own_forward(module: nn.Module) -> Function | None:
    """The forward that was set on a module instead of its class, such as accelerate's, which moves its inputs."""
    return module.__dict__.get("forward")


def _why_experts_copy(experts: QuantizedExperts) -> str | None:
    """The reason why experts copy row counts to the host, which cannot be captured; None if they do not."""
    stack, path = experts.stack(experts.layout.up_name), experts.compute_path(experts.layout.up_name)
    if stack.device.type != "cuda" or path.name == "fused":
        return None
    # without the fused kernels, low-rank terms use the library path
    paths = (path, choose_library_path(stack.device, stack.dtype, stack.in_features, stack.out_features, path.reason))
    return next((one.reason for one in paths if one.name == "loop"), None)


_NUMBERS = frozenset((bool, int, float))
_WITHOUT_CONSTANTS = frozenset((nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.Identity))
"""Half of the modules of a layer with adapters."""


def layer_state(layer: nn.Module) -> tuple[tuple[int, ...], tuple]:
    """State on which a graph depends.

    Returns:
        Addresses of parameters, buffers and scales of bitsandbytes; and which parameters are trained, attributes that
        are numbers, such as the probability of dropout, state of adapters, kinds of hooks, and forwards that were set
        on modules.
    """
    addresses: list[int] = []
    state: list[Any] = []
    left = [layer]
    while left:  # `parameters()` and `modules()` take longer than a replay
        module = left.pop()
        for parameter in module._parameters.values():
            if parameter is not None:
                addresses.append(parameter.data_ptr())
                state.append(parameter.requires_grad)
                scales = parameter.__dict__.get("quant_state")
                while scales is not None:  # nested scales have scales of their own
                    addresses.append(scales.absmax.data_ptr())
                    scales = scales.state2
        if module._buffers:
            addresses += [buffer.data_ptr() for buffer in module._buffers.values() if buffer is not None]
        if module is not layer and has_hooks(module):
            state.append(kind_of_hooks(module))
        if module.__class__ not in _WITHOUT_CONSTANTS:
            state += [value for value in module.__dict__.values() if value.__class__ in _NUMBERS]
        forward = own_forward(module)
        if forward is not None:
            state.append(id(forward))
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
            state += adapter_state(module)
        left += [child for child in module._modules.values() if child is not None]
    return tuple(addresses), tuple(state)


def adapter_attributes(module: LoraLayer | AuxiliaryTrainingWrapper) -> tuple[Any, ...]:
    """Which adapters a module computes, and how. Lists and dictionaries are the module's own, which PEFT changes.

    A module that is trained in full has neither merges nor scaling.
    """
    own = module.__dict__  # `isinstance` with an abstract class is slow
    return module.active_adapter, module.disable_adapters, own.get("merged_adapters"), own.get("scaling")


def adapter_state(module: LoraLayer | AuxiliaryTrainingWrapper) -> list[Any]:
    """Hashable copies of the attributes."""
    return [
        tuple(value.items()) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
        for value in adapter_attributes(module)
    ]
