"""How decoder layers run in training: checkpointed, compiled, from CUDA graphs, or several of these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..ops import keep_experts
from .compiled import CACHES, compiled_forward
from .cuda_graphs import CudaBackend
from .decode_graphs import DecodeRunner
from .layer_graphs import LayerGraphs, why_sequences_are_split

Keep = Literal["nothing", "experts", "everything"]

GRAPHS_BACKEND = CudaBackend
"""What captures."""

_RECORDED = ("output_router_logits", "output_attentions")


@dataclass(frozen=True)
class RunSettings:
    """How decoder layers run in training.

    Args:
        keep: what the forward keeps for the backward: `"nothing"` but a layer's input, `"experts"` for the activations
            of experts too, or `"everything"`.
        compile_layers: compile each layer.
        cuda_graphs: capture each layer.
    """

    keep: Keep = "nothing"
    compile_layers: bool = False
    cuda_graphs: bool = False


class LayerRunner:
    """Takes the place of a decoder layer's `forward`.

    In evaluation mode or without gradients, it only calls that.

    Args:
        layer: the decoder layer.
        settings: how it runs.
        graphs: those of the model, None without.
    """

    def __init__(self, layer: nn.Module, settings: RunSettings, graphs: LayerGraphs | None) -> None:
        self.layer = layer
        self.settings = settings
        self.graphs = graphs
        self._function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.plain_function(*args, **kwargs)
        # recomputation would write to a cache again
        kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
        if self.graphs is None:
            return self.without_graphs(*args, **kwargs)
        return self.graphs.run(self.layer, self.function, self.without_graphs, args, kwargs)

    @property
    def plain_function(self) -> Callable[..., Any]:
        return MethodType(type(self.layer).forward, self.layer)

    @property
    def function(self) -> Callable[..., Any]:
        """The layer's own forward, compiled if the settings say so."""
        if self._function is None:
            self._function = compiled_forward(self.layer) if self.settings.compile_layers else self.plain_function
        return self._function

    def without_graphs(self, *args: Any, **kwargs: Any) -> Any:
        """Checkpointed as the settings say."""
        if self.settings.keep == "everything":
            return self.function(*args, **kwargs)
        context_fn = keep_experts if self.settings.keep == "experts" else noop_context_fn
        return checkpoint(self.function, *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain_function)

    def __getstate__(self) -> dict[str, Any]:
        # a compiled function can't be copied, and is recreated
        return {**self.__dict__, "_function": None}


class _BeforeForward:
    """A forward pre-hook of the model, for what its layers don't see of a call."""

    def __init__(self, layers: Sequence[nn.Module], graphs: LayerGraphs | None) -> None:
        self.layers = layers
        self.graphs = graphs

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for layer in self.layers:
            if layer.gradient_checkpointing:
                # a Trainer with gradient_checkpointing=True would checkpoint these layers twice
                layer.gradient_checkpointing = False
        if self.graphs is not None:
            recorded = [name for name in _RECORDED if _is_asked(model, name, kwargs)]
            why_recorded = f"{recorded[0]}=True records what happens inside a layer" if recorded else None
            self.graphs.is_paused = why_recorded or why_sequences_are_split(model.config)


def _is_asked(model: nn.Module, name: str, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get(name)
    return bool(getattr(model.config.get_text_config(), name, False) if asked is None else asked)


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that transformers would checkpoint."""
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def run_layers(model: nn.Module, settings: RunSettings) -> None:
    """Makes all decoder layers of a transformers model run in training as the settings say.

    Args:
        model: with or without adapters.
        settings: how.

    Raises:
        ValueError: the model has no decoder layers that can be checkpointed, or its layers have been set up before.
    """
    layers = list(decoder_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers can checkpoint, so that none can be compiled, "
            "captured or checkpointed. Leave compile_layers and cuda_graphs out."
        )
    if any(isinstance(layer.__dict__.get("forward"), LayerRunner) for layer in layers):
        raise ValueError(f"The layers of {type(model).__name__} have been set up before; set them up once.")
    graphs = LayerGraphs(settings.keep, GRAPHS_BACKEND) if settings.cuda_graphs else None
    for layer in layers:
        layer.forward = LayerRunner(layer, settings, graphs)
    if graphs is not None:
        decoder = model.get_decoder()
        decoder.forward = DecodeRunner(decoder, GRAPHS_BACKEND)
    model.register_forward_pre_hook(_BeforeForward(layers, graphs), with_kwargs=True)


def graphs_of(model: nn.Module) -> list[LayerGraphs | DecodeRunner]:
    """What captures of a model: the graphs of its layers in training, and that of a step of decoding."""
    runners = [module.__dict__.get("forward") for module in model.modules()]
    layers = {id(one.graphs): one.graphs for one in runners if isinstance(one, LayerRunner) and one.graphs is not None}
    return [*layers.values(), *(one for one in runners if isinstance(one, DecodeRunner))]


def graphs_report(model: nn.Module) -> str:
    """Lists which layers of a model are captured in CUDA graphs, and why others are not."""
    lines = [line for graphs in graphs_of(model) for line in graphs.report()]
    return "\n".join(lines) or "Layers run without CUDA graphs."


def release_graphs(model: nn.Module) -> None:
    """Frees the CUDA graphs of a model and their memory; they are recaptured when needed."""
    for graphs in graphs_of(model):
        graphs.forget()
