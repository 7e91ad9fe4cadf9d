"""Reports the contents of a checkpoint and the memory for training, from its config and headers only."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..experts import read_layout
from ..quantization import Format, FourBitFormat
from .cards.estimate import GIB, MemoryEstimate, Settings, estimate
from .cards.opened import OpenedCheckpoint
from .cards.sizes import linear_for_4_bits
from .checkpoint import Checkpoint
from .packed_sources import PackedSource
from .quantization_config import MoeQuantizationConfig
from .sources import NativeSource, Source


@dataclass(frozen=True)
class StackGroup:
    """Stacks that differ only in their layer.

    Args:
        path: path of the stack, with N for the layer.
        count: number of stacks.
        class_name: class of the experts module.
        shape: `(E, rows, columns)` of each stack.
        layout: orientation, interleaving, bias and gate, in words.
        found: storage in the checkpoint.
        dense_nbytes: size of all stacks in 16 bits.
        packed_nbytes: size of all stacks when loaded; stacks that are packed in the checkpoint stay unchanged.
        adapter_parameters: number of LoRA parameters on all stacks, at the requested rank.
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
class Inspection:
    """Result of `inspect_checkpoint`; prints as tables, `to_dict` returns plain data.

    Args:
        model_class: model class named in the config.
        quantization: `quant_method` of the checkpoint, None for an unquantized one.
        num_files: number of shards.
        stacks: the stacks of the experts.
        linear_weights: number of weights in linear layers that are quantized in the checkpoint or when loaded.
        other_weights: number of all other weights.
        linear_adapter_parameters: number of LoRA parameters on linear layers, at the requested rank.
        memory: estimate of the memory for training.
        settings: the arguments of `inspect_checkpoint`.
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
        settings = self.settings
        return "\n".join(
            [
                f"{self.model_class} in {self.num_files} file(s){quantized}",
                tabulate(rows, header, disable_numparse=True),
                f"other weights: {self.linear_weights:,} in quantized linear layers, {self.other_weights:,} elsewhere",
                f"adapter parameters: {of_experts:,} on experts (rank {settings['expert_r']}), "
                f"{self.linear_adapter_parameters:,} on linear layers (rank {settings['r']})",
                f"estimated memory for training with {settings['batch']} x {settings['seq']} tokens and gradient "
                f"checkpointing {'of all but the experts' if settings['keep_experts'] else 'by layer'}:",
                self.memory.table(),
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
    """Reports the contents of a checkpoint and its memory for training, without loading weights.

    Args:
        directory: directory of a safetensors checkpoint with config.json.
        storage: storage format for experts in floating point.
        r: rank on linear layers.
        expert_r: rank on experts; by default `r`.
        seq: number of tokens per sequence.
        batch: number of sequences per step.
        keep_experts: whether training uses `use_gradient_checkpointing="keep-experts"`.

    Raises:
        CheckpointError: see `readable_quantization`, `Checkpoint` and `SourceFinder`.
        ValueError: the model has no routed experts, or the class of the experts is not supported.
    """
    expert_r = r if expert_r is None else expert_r
    if not Path(directory).is_dir():
        raise ValueError(
            f"{directory} is not a directory. Expected the directory of a checkpoint. For a config.json or the name "
            "of a well-known model, use --card."
        )
    opened = OpenedCheckpoint.open(directory)
    model, saved = opened.model, opened.saved
    groups: dict[tuple, list[tuple[Source, int, int]]] = defaultdict(list)
    for path, of_module in opened.sources.items():
        layout = read_layout(model.get_submodule(path), path)
        words = [
            "(in, out)" if layout.is_transposed else "(out, in)",
            *(["interleaved"] if not layout.is_concatenated else []),
            *(["bias"] if layout.has_bias else []),
            *(["no gate"] if not layout.has_gate else []),
        ]
        for projection, source in of_module.items():
            nbytes = opened.empty_stack(source, storage).nbytes
            added = expert_r * layout.num_experts * sum(layout.features(projection))
            name = re.sub(r"\b\d+\b", "N", source.target.name)
            found = _found(source, opened.checkpoint, saved)
            key = (name, layout.class_name, source.target.shape, ", ".join(words), found)
            groups[key].append((source, nbytes, added))
    stacks = tuple(
        StackGroup(
            path=name,
            count=len(found),
            class_name=class_name,
            shape=shape,
            layout=words,
            found=stored,
            dense_nbytes=sum(2 * prod(source.target.shape) for source, _, _ in found),
            packed_nbytes=sum(nbytes for _, nbytes, _ in found),
            adapter_parameters=sum(added for _, _, added in found),
        )
        for (name, class_name, shape, words, stored), found in groups.items()
    )
    double_quant = isinstance(storage, FourBitFormat) and storage.double_quant
    packed = opened.packed_weights(double_quant)
    in_4_bits = linear_for_4_bits(model, packed) if opened.quantization is None else {}
    in_fewer_bits = [*packed, *(f"{path}.weight" for path in in_4_bits)]
    linear_weights = sum(model.get_parameter(name).numel() for name in in_fewer_bits)
    of_experts = sum(prod(source.target.shape) for found in groups.values() for source, _, _ in found)
    sizes = opened.sizes(double_quant)
    settings = Settings(
        # weights packed in the checkpoint stay unchanged
        storage if opened.quantization is None else None,
        r,
        expert_r,
        seq,
        batch,
        keep_experts,
        linear_in_4_bits=opened.quantization is None,
        logits=True,
        accumulates=True,
    )
    return Inspection(
        model_class=type(model).__name__,
        quantization=opened.method,
        num_files=len(opened.checkpoint.files),
        stacks=stacks,
        linear_weights=linear_weights,
        other_weights=sum(parameter.numel() for parameter in model.parameters()) - of_experts - linear_weights,
        linear_adapter_parameters=sum(r * count * sum(shape) for shape, count in sizes.factors.items()),
        memory=estimate(sizes, settings),
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
