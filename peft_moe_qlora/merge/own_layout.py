"""Writing a merged model in the layout of its base's checkpoint: unchanged tensors are copied byte by byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from functools import partial

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..loading.checkpoint import INDEX_NAME, Checkpoint
from ..loading.disk import PackedTensor
from ..loading.finder import SourceFinder
from ..loading.packed_sources import PackedSource
from ..loading.quantizer import quantized_stacks
from ..loading.sources import DenseSource, Source
from ..quantization import QuantizedStack, Stack
from ..quantized_linear import QuantizedLinear
from .partial_directory import PartialDirectory

Tensors = dict[str, Callable[[], torch.Tensor]]
"""Key -> function that returns its new tensor."""


def write_in_own_layout(
    merged: PreTrainedModel,
    finder: SourceFinder,
    sources: dict[str, Source],
    changed: Collection[str],
    output: PartialDirectory,
    progressbar: bool = True,
) -> None:
    """Writes the shards of a base with the weights that an adapter has changed.

    Args:
        merged: the merged model, with its stacks and layers in the formats of the base.
        finder: finder of the base's checkpoint, after `find`.
        sources: name of a stack -> its tensors in the checkpoint.
        changed: names in the model of the merged stacks and parameters.
        output: the output directory.
        progressbar: whether to show a progress bar.

    Raises:
        CheckpointError: a layout cannot store merged weights.
        ValueError: a merged weight is not a separate tensor in the checkpoint, or is stored in another format there.
    """
    checkpoint = finder.checkpoint
    new = _new_tensors(merged, finder, sources, changed)
    total = len(checkpoint.tensors)
    with tqdm(total=total, desc="Writing", unit="tensor", disable=not progressbar) as bar:
        for file in checkpoint.files:
            keys = [key for key, info in checkpoint.tensors.items() if info.file == file]
            tensors = {}
            for key in sorted(keys, key=checkpoint.position):
                tensors[key] = new[key]() if key in new else checkpoint.read(key)
                bar.update()
            name = file.relative_to(checkpoint.directory).as_posix()
            save_file(tensors, output.path_to_write(name), checkpoint.metadata[file] or None)
            output.written(name)
    index = checkpoint.directory / INDEX_NAME
    if index.is_file():
        shutil.copyfile(index, output.path_to_write(INDEX_NAME))
        output.written(INDEX_NAME)


def _new_tensors(
    merged: PreTrainedModel, finder: SourceFinder, sources: dict[str, Source], changed: Collection[str]
) -> Tensors:
    stacks = {name: stack for name, _, stack in quantized_stacks(merged)}
    keys = finder.beside_stacks | finder.plain_tensors()
    new: Tensors = {}
    for name in changed:
        path, _, parameter = name.rpartition(".")
        layer = merged.get_submodule(path) if path else merged
        if name in stacks:
            new |= _of_stack(stacks[name], sources[name], finder.checkpoint)
        elif isinstance(layer, QuantizedLinear) and parameter == "weight":
            packed = finder.packed_beside[name]
            new |= {key: partial(_of_layer, layer, packed, key) for key in packed.write(_on_cpu(layer.tensors))}
        elif name in finder.packed_beside:
            packed = finder.packed_beside[name]
            matrix = partial(_of_parameter, merged, name, torch.float32)
            new |= {key: partial(_requantized, matrix, packed, finder.checkpoint, key) for key in packed.keys}
        elif name in keys:
            new[keys[name]] = partial(_of_parameter, merged, name, finder.checkpoint.tensors[keys[name]].dtype)
        else:
            raise ValueError(
                f"The adapter changes {name}, which is not a separate tensor in {finder.checkpoint.directory}. Merge "
                "into 16 bits (without --quantize)."
            )
    return new


def _has_other_second_scale(layer: QuantizedLinear, packed: PackedTensor, checkpoint: Checkpoint) -> bool:
    before = packed.read(checkpoint)
    second = list(_on_cpu(layer.tensors).items())[2:]
    return any(not torch.equal(tensor, before[name]) for name, tensor in second)


def notes_of_second_scales(merged: PreTrainedModel, finder: SourceFinder, changed: Collection[str]) -> tuple[str, ...]:
    """Notes on layers whose second-level scale had to grow, because engines share one scale among fused layers.

    Args:
        merged: as in `write_in_own_layout`.
        finder: as in `write_in_own_layout`.
        changed: as in `write_in_own_layout`.
    """
    found = []
    for name in changed:
        layer = merged.get_submodule(name.rpartition(".")[0])
        packed = finder.packed_beside.get(name) if isinstance(layer, QuantizedLinear) else None
        if packed is not None and _has_other_second_scale(layer, packed, finder.checkpoint):
            found.append(name)
    if not found:
        return ()
    return (
        f"{len(found)} linear layers have a new second-level scale, {found[0]} first, because their merged weights "
        "exceed the range of the base's scale. Engines that fuse layers, such as q, k and v, use one scale for all of "
        "them and misread the others. To serve the model, merge into 16 bits (without --quantize).",
    )


def _of_layer(layer: QuantizedLinear, packed: PackedTensor, key: str) -> torch.Tensor:
    return packed.write(_on_cpu(layer.tensors))[key]


def _requantized(
    matrix: Callable[[], torch.Tensor], packed: PackedTensor, checkpoint: Checkpoint, key: str
) -> torch.Tensor:
    """Requantizes a weight that is decoded in the model; tensors other than its codes and scales are kept."""
    stored = packed.storage.requantize(matrix(), packed.read(checkpoint), packed.num_parts)
    written = packed.write(stored)
    return written[key] if key in written else checkpoint.read(key)


def _of_parameter(merged: nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    return merged.get_parameter(name).detach().to("cpu", dtype).contiguous()


def _of_stack(stack: Stack, source: Source, checkpoint: Checkpoint) -> Tensors:
    if isinstance(source, PackedSource):
        if stack.storage != source.storage:
            raise ValueError(
                f"{source.target.name} was stored as {stack.storage or '16 bits'} in training, but as "
                f"{source.storage} in the base, so the base's layout cannot be used. Set layout='native' "
                "(--layout native)."
            )
        if source.is_fused:
            packed = source.lists[0][0]
            keys = packed.write(_tensors_of(stack, 0))
            return {key: partial(_of_all_experts, stack, packed, key) for key in keys}
        new: Tensors = {}
        for expert in range(stack.num_experts):
            for number, tensors in enumerate(source.lists):
                packed = tensors[source.first_expert + expert]
                write = partial(_of_part, stack, expert, number, len(source.lists), packed)
                new |= {key: partial(write, key) for key in write(None)}
        return new
    if isinstance(source, DenseSource):
        return _of_dense(stack, source, checkpoint)
    raise TypeError(f"{type(source).__name__} is not supported. Expected a PackedSource or a DenseSource.")


def _of_part(stack: QuantizedStack, expert: int, number: int, count: int, packed: PackedTensor, key: str | None):
    """A tensor of one part of an expert's matrix, such as its gate; all tensors of the part if `key` is None."""
    part = {name: tensor.chunk(count)[number] for name, tensor in _tensors_of(stack, expert).items()}
    written = packed.write(part)
    return written if key is None else written[key]


def _of_all_experts(stack: QuantizedStack, packed: PackedTensor, key: str) -> torch.Tensor:
    return torch.stack([packed.write(_tensors_of(stack, expert))[key] for expert in range(stack.num_experts)])


def _of_dense(stack: Stack, source: DenseSource, checkpoint: Checkpoint) -> Tensors:
    """New tensors of a floating-point stack in a quantized checkpoint."""
    places = source.find_places(checkpoint)

    def tensor_of(key: str, experts: list[int]) -> torch.Tensor:
        tensor = checkpoint.read(key).clone()
        for expert in experts:
            matrix = stack.decode_expert(expert, torch.float32).cpu()
            for part in source.parts_of_expert(expert, checkpoint, places):
                if part.key == key:
                    place = tensor[expert : expert + 1] if part.is_stack else tensor
                    place.copy_(part.of(matrix))
        return tensor

    experts_of: dict[str, list[int]] = {}
    for expert in range(stack.num_experts):
        for part in source.parts_of_expert(expert, checkpoint, places):
            experts_of.setdefault(part.key, []).append(expert)
    return {key: partial(tensor_of, key, experts) for key, experts in experts_of.items()}


def _tensors_of(stack: QuantizedStack, expert: int) -> dict[str, torch.Tensor]:
    return _on_cpu({name: tensor[0] for name, tensor in stack.tensors_of(slice(expert, expert + 1)).items()})


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
