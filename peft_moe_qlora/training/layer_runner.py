"""Runs decoder layers in training with checkpointing, compilation, CUDA graphs, or several of these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..ops import keep_experts, leave_regions
from .compiled import CACHES, compiled_forward
from .cuda_graphs import CudaBackend
from .decode_graphs import DecodeRunner
from .layer_graphs import LayerGraphs, own_forward, why_sequences_are_split

Keep = Literal["nothing", "experts", "everything"]

GRAPHS_BACKEND = CudaBackend
"""Backend for the capture."""

_RECORDED = ("output_router_logits", "output_attentions")


@dataclass(frozen=True)
class RunSettings:
    """Settings of decoder layers in training.

    Args:
        keep: activations that the forward saves in addition to the input of the layer: `"nothing"`, `"experts"` or
            `"everything"`.
        compile_layers: compile each layer.
        cuda_graphs: capture each layer.
    """

    keep: Keep = "nothing"
    compile_layers: bool = False
    cuda_graphs: bool = False


class LayerRunner:
    """Replaces the `forward` of a decoder layer.

    In evaluation mode or without gradients, it only calls the original forward.

    Args:
        layer: the decoder layer.
        settings: the settings.
        graphs: graphs of the model; None without CUDA graphs.
    """

    def __init__(self, layer: nn.Module, settings: RunSettings, graphs: LayerGraphs | None) -> None:
        self.layer = layer
        self.settings = settings
        self.graphs = graphs
        self._own_forward = own_forward(layer)
        self._function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.plain_function(*args, **kwargs)
        if not self.layer._can_checkpoint_with_cache:
            dropped = {name: None for name in CACHES if name in kwargs and not self._reads(kwargs[name])}
            kwargs = {**kwargs, **dropped}
        if self.graphs is None or torch.compiler.is_compiling():
            return self.without_graphs(*args, **kwargs)
        return self.graphs.run(self.layer, self.function, self.without_graphs, args, kwargs)

    def _reads(self, cache: Any) -> bool:
        """Whether the layer reads a KV cache: not if recomputation would write to it again, nor if it is empty."""
        return self.settings.keep == "everything" and isinstance(cache, Cache) and cache.get_seq_length() > 0

    @property
    def plain_function(self) -> Callable[..., Any]:
        # torch.compile of a whole model cannot trace MethodType
        return self._own_forward or partial(type(self.layer).forward, self.layer)

    @property
    def function(self) -> Callable[..., Any]:
        """The forward of the layer, compiled if set."""
        if self._function is None:
            self._function = self.plain_function
            if self.settings.compile_layers:
                # captured backwards keep the graph, whose activations each replay reads
                retains_graph = self.settings.cuda_graphs and self.settings.keep == "everything"
                self._function = compiled_forward(self.layer, retains_graph=retains_graph)
        return self._function

    def without_graphs(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer with checkpointing as set."""
        is_compiling = torch.compiler.is_compiling()
        function = self.plain_function if is_compiling else self.function
        if self.settings.keep == "everything":
            return function(*args, **kwargs)
        # torch.compile of a whole model does not support any context_fn
        options = {"context_fn": keep_experts} if self.settings.keep == "experts" and not is_compiling else {}
        return checkpoint(function, *args, use_reentrant=False, **options, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain_function)

    def __getstate__(self) -> dict[str, Any]:
        # a compiled function cannot be copied; it is created again
        return {**self.__dict__, "_function": None}


class _ForwardHooks:
    """Hooks around the forward of a model or of its stack of layers, which read arguments that layers do not get."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], graphs: LayerGraphs | None) -> None:
        self.model = model
        self.layers = layers
        self.graphs = graphs

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for layer in self.layers:
            if layer.gradient_checkpointing:
                # with gradient_checkpointing=True, Trainer would checkpoint these layers twice
                layer.gradient_checkpointing = False
        if torch.compiler.is_compiling():
            return
        leave_regions()
        if self.graphs is not None:
            recorded = [name for name in _RECORDED if _is_asked(model, name, kwargs)]
            why_recorded = f"{recorded[0]}=True records values inside a layer" if recorded else None
            now = self.graphs.now
            now.attention = model.config.get_text_config()._attn_implementation
            is_part = model is not self.model and bool(now.running) and now.running[-1][0] is self.model
            of_model = now.is_paused if is_part else None
            now.running.append((model, now.is_paused))
            now.is_paused = of_model or why_recorded or why_sequences_are_split(model.config)

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        now, ended = self.graphs.now, None
        while ended is not model:
            ended, now.is_paused = now.running.pop()


def _is_asked(model: nn.Module, name: str, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get(name)
    return bool(getattr(model.config.get_text_config(), name, False) if asked is None else asked)


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that transformers checkpoints."""
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def check_layers(model: nn.Module, settings: RunSettings | None) -> None:
    """Checks that `run_layers` can apply the settings; None if it is not to be called.

    Raises:
        ValueError: the layers of the model are already prepared, or it has no `GradientCheckpointingLayer`; or layers
            that are to be compiled have forwards of their own.
    """
    layers = list(decoder_layers(model))
    if any(isinstance(layer.__dict__.get("forward"), LayerRunner) for layer in layers):
        raise ValueError(
            f"The layers of {type(model).__name__} are already prepared. Call prepare_model_for_training once."
        )
    if not layers and settings is not None:
        raise ValueError(
            f"{type(model).__name__} has no GradientCheckpointingLayer, so its decoder layers cannot be compiled, "
            "captured or checkpointed except for their experts. Remove compile_layers and cuda_graphs, and set "
            "use_gradient_checkpointing to True or False."
        )
    if settings is not None and settings.compile_layers and any(own_forward(layer) for layer in layers):
        raise ValueError(
            f"Layers of {type(model).__name__} have forwards of their own, by which accelerate moves tensors between "
            "devices (a device_map over several devices), and which torch.compile would leave out. Remove "
            "compile_layers, or load the model onto one device."
        )


def run_layers(model: nn.Module, settings: RunSettings) -> None:
    """Applies the settings to all decoder layers of a transformers model for which `check_layers` passes.

    Args:
        model: the model, with or without adapters.
        settings: the settings.
    """
    layers = list(decoder_layers(model))
    graphs = LayerGraphs(settings.keep, GRAPHS_BACKEND) if settings.cuda_graphs else None
    for layer in layers:
        layer.forward = LayerRunner(layer, settings, graphs)
    decoder = model.get_decoder()
    if graphs is not None:
        decoder.forward = DecodeRunner(decoder, GRAPHS_BACKEND)
    hooks = _ForwardHooks(model, layers, graphs)
    for module in {model, decoder}:  # some trainers call the stack of layers directly
        module.register_forward_pre_hook(hooks.before, with_kwargs=True)
        if graphs is not None:
            module.register_forward_hook(hooks.after, always_call=True)


def graphs_of(model: nn.Module) -> list[LayerGraphs | DecodeRunner]:
    """The graphs of a model: of its layers in training, and of a decoding step."""
    runners = [module.__dict__.get("forward") for module in model.modules()]
    layers = {id(one.graphs): one.graphs for one in runners if isinstance(one, LayerRunner) and one.graphs is not None}
    return [*layers.values(), *(one for one in runners if isinstance(one, DecodeRunner))]


def graphs_report(model: nn.Module) -> str:
    """Lists the CUDA graphs of a model, and the reasons for calls without a graph."""
    lines = [line for graphs in graphs_of(model) for line in graphs.report()]
    return "\n".join(lines) or "Layers run without CUDA graphs."


def release_graphs(model: nn.Module) -> None:
    """Frees the CUDA graphs of a model and their memory; they are captured again when needed."""
    for graphs in graphs_of(model):
        graphs.forget()
