"""What a checkpoint holds and what it would take to train, from its config and headers alone."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from ..experts import read_layout, refuse_unsupported
from ..ops import kept_nbytes
from ..quantization import Format, FourBitFormat, parse_format
from ..targets import expert_layouts, is_router
from ..unadaptable import why_unadaptable
from .checkpoint import Checkpoint
from .disk import quant_method
from .expert_shapes import top_k_of
from .finder import SourceFinder
from .linear import asked_for_dtype
from .load import class_of, read_config, readable_quantization, saved_config
from .packed_sources import PackedSource
from .quantization_config import MoeQuantizationConfig
from .quantizer import refuse_unexplained
from .sources import DenseSource, NativeSource, Source

GIB = 2**30
BYTES_PER_TRAINED_PARAMETER = 16
"""fp32 factors, their gradients, and AdamW's two moments."""
LARGEST_WORKSPACE = 256 * 2**20
"""What decoding before the products takes at most."""


@dataclass(frozen=True)
class StackGroup:
    """Stacks that differ in their layer only.

    Args:
        path: of the stack, with N for the layer.
        count: how many there are.
        class_name: of the experts module.
        shape: `(E, rows, columns)` of each.
        layout: orientation, gate and bias, in words.
        found: how the checkpoint has them.
        dense_nbytes: of all in 16 bits.
        packed_nbytes: of all as they would be stored; what the checkpoint has packed stays as it is.
        adapter_parameters: of all, at the rank asked for.
    """

    path: str
    count: int
    class_name: str
    shape: tuple[int, ...]
    layout: str
    found: str
    dense_nbytes: int
    packed_nbytes: int
    adapter_parameters: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs at least, by what for. Activations are those of gradient checkpointing by layer.

    Args:
        weights: quantized, with what stays in 16 bits.
        trained: adapter in fp32, gradients and AdamW's moments.
        checkpoints: the inputs of all layers in 16 bits.
        kept_experts: activations of all experts, where the recomputation leaves them out.
        one_layer: activations and gradients of the layer that is recomputed, experts' workspace included.
        logits: in 16 bits, in fp32, and their gradient.
    """

    weights: int
    trained: int
    checkpoints: int
    kept_experts: int
    one_layer: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found; prints as tables, and `to_dict` gives plain data.

    Args:
        model_class: that the checkpoint's config names.
        quantization: `quant_method` of the checkpoint, None for none.
        num_files: shards.
        stacks: of the experts.
        linear_weights: number of weights in linear layers that are stored in fewer than 16 bits, or would be.
        other_weights: number of all other weights.
        linear_adapter_parameters: at the rank asked for.
        memory: what training needs.
        settings: what was asked for.
    """

    model_class: str
    quantization: str | None
    num_files: int
    stacks: tuple[StackGroup, ...]
    linear_weights: int
    other_weights: int
    linear_adapter_parameters: int
    memory: MemoryEstimate
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory_total": self.memory.total}

    def __str__(self) -> str:
        header = ("experts", "modules", "class", "shape", "layout", "in the checkpoint", "16-bit GiB", "stored GiB")
        rows = [
            (
                group.path,
                group.count,
                group.class_name,
                "x".join(map(str, group.shape)),
                group.layout,
                group.found,
                f"{group.dense_nbytes / GIB:.3f}",
                f"{group.packed_nbytes / GIB:.3f}",
            )
            for group in self.stacks
        ]
        quantized = f", quantized by {self.quantization}" if self.quantization else ""
        of_experts = sum(group.adapter_parameters for group in self.stacks)
        memory = [(name.replace("_", " "), f"{size / GIB:.3f}") for name, size in asdict(self.memory).items()]
        memory.append(("total", f"{self.memory.total / GIB:.3f}"))
        settings = self.settings
        return "\n".join(
            [
                f"{self.model_class} in {self.num_files} file(s){quantized}",
                tabulate(rows, header, disable_numparse=True),
                f"other layers: {self.linear_weights:,} weights in linear layers, {self.other_weights:,} elsewhere",
                f"adapter: {of_experts:,} parameters on experts at rank {settings['expert_r']}, "
                f"{self.linear_adapter_parameters:,} on linear layers at rank {settings['r']}",
                f"training, {settings['batch']} x {settings['seq']} tokens, with gradient checkpointing "
                f"{'of all but the experts' if settings['keep_experts'] else 'by layer'}, at least:",
                tabulate(memory, ("", "GiB"), disable_numparse=True, colalign=("left", "right")),
            ]
        )


def inspect_checkpoint(
    directory: str | Path,
    storage: Format = FourBitFormat(),  # noqa: B008 - frozen
    r: int = 16,
    expert_r: int | None = None,
    seq: int = 2048,
    batch: int = 1,
    keep_experts: bool = False,
) -> Inspection:
    """Looks at a checkpoint without loading a weight.

    Args:
        directory: of the checkpoint, in safetensors, with its config.
        storage: that experts in floating point would get.
        r: rank on linear layers.
        expert_r: rank on experts; by default `r`.
        seq: tokens in a sequence.
        batch: sequences in a step.
        keep_experts: training is with `use_gradient_checkpointing="keep-experts"`.

    Raises:
        CheckpointError: see `readable_quantization`, `Checkpoint` and `SourceFinder`.
        ValueError: the model has no routed experts, or of a class that is not supported.
    """
    expert_r = r if expert_r is None else expert_r
    if not Path(directory).is_dir():
        raise ValueError(f"{directory} is no directory.")
    config = read_config(directory)
    quantization = readable_quantization(config, directory)
    saved = saved_config(Path(directory))
    checkpoint = Checkpoint.open(directory)
    with torch.device("meta"):
        model = class_of(config)._from_config(config)
    refuse_unsupported(model)
    finder = SourceFinder(model, checkpoint, (saved and saved.flipped_stacks) or ())
    sources = finder.find()
    refuse_unexplained(sources, saved, directory)
    if not sources:
        raise ValueError(f"{directory}: {type(model).__name__} has no routed experts.")
    text_config, tokens, kept_experts = config.get_text_config(decoder=True), seq * batch, 0
    groups: dict[tuple, list[tuple[Source, int, int]]] = defaultdict(list)
    for path, of_module in sources.items():
        layout = read_layout(model.get_submodule(path), path)
        if keep_experts:
            hidden, up_features = layout.features(layout.up_name)
            kept_experts += kept_nbytes(tokens, top_k_of(text_config) or 1, hidden, up_features, expert_r)
        words = [
            "(in, out)" if layout.is_transposed else "(out, in)",
            *(["interleaved"] if not layout.is_concatenated else []),
            *(["bias"] if layout.has_bias else []),
            *(["no gate"] if not layout.has_gate else []),
        ]
        for projection, source in of_module.items():
            # what a quantized checkpoint has left in 16 bits stays so
            is_left = quantization is not None and isinstance(source, DenseSource)
            of_source = saved.format if isinstance(source, NativeSource) else None if is_left else storage
            packed = source.empty_stack(of_source, torch.bfloat16)
            if isinstance(source, NativeSource):
                source.check(packed, checkpoint)
            added = expert_r * layout.num_experts * sum(layout.features(projection))
            name = re.sub(r"\b\d+\b", "N", source.target.name)
            key = (name, layout.class_name, source.target.shape, ", ".join(words), _found(source, checkpoint, saved))
            groups[key].append((source, packed.nbytes, added))
    stacks = tuple(
        StackGroup(
            path=name,
            count=len(found),
            class_name=class_name,
            shape=shape,
            layout=words,
            found=stored,
            dense_nbytes=sum(2 * torch.Size(source.target.shape).numel() for source, _, _ in found),
            packed_nbytes=sum(nbytes for _, nbytes, _ in found),
            adapter_parameters=sum(added for _, _, added in found),
        )
        for (name, class_name, shape, words, stored), found in groups.items()
    )
    linear = _quantizable_linear(model)
    if quantization is not None:
        packed_names = finder.packed_names()
        stored = {f"{name}.weight": module for name, module in model.named_modules()}
        packed_linear = [module for name, module in stored.items() if name in packed_names]
    else:
        kept = set(asked_for_dtype(model))
        packed_linear = [module for name, module in linear.items() if name not in kept]
    of_checkpoint = _stored_linear(model, finder, saved)
    num_stored = sum(out_features * in_features for (out_features, in_features), _ in of_checkpoint)
    linear_weights = sum(module.weight.numel() for module in packed_linear) + num_stored
    adaptable = [module for name, module in linear.items() if not why_unadaptable(name, model)]
    linear_adapter = sum(r * (module.in_features + module.out_features) for module in adaptable)
    of_experts = sum(torch.Size(source.target.shape).numel() for found in groups.values() for source, _, _ in found)
    other_weights = sum(parameter.numel() for parameter in model.parameters()) - of_experts - linear_weights
    trained = linear_adapter + sum(group.adapter_parameters for group in stacks)
    weights = (
        sum(group.packed_nbytes for group in stacks)
        + int(
            (linear_weights - num_stored)
            * (0.5 + _scale_bytes(isinstance(storage, FourBitFormat) and storage.double_quant))
        )
        + sum(_nbytes(shape, of_layer) for shape, of_layer in of_checkpoint)
        + 2 * other_weights
    )
    return Inspection(
        model_class=type(model).__name__,
        quantization=None if quantization is None else quant_method(quantization),
        num_files=len(checkpoint.files),
        stacks=stacks,
        linear_weights=linear_weights,
        other_weights=other_weights,
        linear_adapter_parameters=linear_adapter,
        memory=_memory(text_config, stacks, weights, trained, tokens, kept_experts),
        settings={
            "storage": str(storage),
            "r": r,
            "expert_r": expert_r,
            "seq": seq,
            "batch": batch,
            "keep_experts": keep_experts,
        },
    )


def _found(source: Source, checkpoint: Checkpoint, saved: MoeQuantizationConfig | None) -> str:
    if isinstance(source, PackedSource):
        return source.description
    if isinstance(source, NativeSource):
        return str(saved.format)
    info = checkpoint.tensors[source.keys[0]]
    return f"{info.dtype}, {'one tensor per expert' if len(info.shape) == 2 else 'fused'}".removeprefix("torch.")


def _stored_linear(
    model: nn.Module, finder: SourceFinder, saved: MoeQuantizationConfig | None
) -> list[tuple[tuple[int, int], Format]]:
    """Shape and storage of the linear layers whose codes and scales stay as the checkpoint has them."""
    found = [(packed.shape, packed.storage) for packed in finder.packed_beside.values()]
    if saved is not None and saved.linear_storage is not None:
        storage = parse_format(saved.linear_storage)
        layers = [model.get_submodule(path) for path in finder.saved_linear(model, storage)]
        found += [((layer.out_features, layer.in_features), storage) for layer in layers]
    return found


def _nbytes(shape: tuple[int, int], storage: Format) -> int:
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in storage.tensors(*shape).values())


def _quantizable_linear(model: nn.Module) -> dict[str, nn.Linear]:
    layouts = expert_layouts(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not is_router(name, module, layouts)
    }


def _scale_bytes(double_quant: bool) -> float:
    """Per weight, in blocks of 64: fp32, or 8 bits with an fp32 for 256 of them (QLoRA, section 3)."""
    return (1 + 4 / 256) / 64 if double_quant else 4 / 64


def _memory(
    config: Any, stacks: tuple[StackGroup, ...], weights: int, trained: int, tokens: int, kept: int
) -> MemoryEstimate:
    hidden, num_layers = config.hidden_size, config.num_hidden_layers
    top_k = top_k_of(config) or 1
    widest = max(sum(group.shape[1:]) for group in stacks)
    # of each routed row: both sides of the projections, forward and backward; of each token: attention, likewise
    one_layer = 2 * 2 * tokens * (top_k * widest + 12 * hidden) + LARGEST_WORKSPACE
    return MemoryEstimate(
        weights=weights,
        trained=BYTES_PER_TRAINED_PARAMETER * trained,
        checkpoints=2 * tokens * hidden * num_layers,
        kept_experts=kept,
        one_layer=one_layer,
        logits=(2 + 4 + 4) * tokens * config.vocab_size,
    )
