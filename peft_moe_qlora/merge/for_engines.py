"""Selects the tensors of a checkpoint that are quantized for serving, and encodes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..layouts.base_model import BaseModel
from ..loading.checkpoint import Checkpoint
from ..loading.disk.for_engines import EngineLayout, Stored
from ..loading.finder import SourceFinder
from ..loading.sources import DenseSource
from ..quantization import QUANTIZABLE_DTYPES
from .edits import MergePlan, StackEdit

_LEAST_DIFFERENCE = 2.0**-9
"""Relative to a weight: half a unit in the last place of bfloat16."""
_WITHOUT = "Merge into 16 bits without serve_as (--serve-as)."


@dataclass(frozen=True)
class Encoder:
    """Encodes one tensor of a checkpoint.

    Args:
        layout: layout of the output.
        keys: keys of the parts of its rows in a 16-bit checkpoint; `{}` is a placeholder for the expert's number.
        shape: `(out, in)` of one part.
        num_experts: number of experts in the tensor; None for a single matrix.
        is_out_in: whether its matrices are `(out, in)`.
    """

    layout: EngineLayout
    keys: tuple[str, ...]
    shape: tuple[int, int]
    num_experts: int | None = None
    is_out_in: bool = True

    def stored(self) -> dict[str, Stored]:
        """Key -> shape and dtype of the written tensors."""
        found = {}
        for key in self.keys:
            for expert in range(self.num_experts or 1):
                for stored_key, stored in self.layout.stored(self._key(key, expert), *self.shape).values():
                    whole = stored if self._is_apart(key) else stored._replace(shape=(self.num_experts, *stored.shape))
                    found[stored_key] = whole
        return found

    def _key(self, key: str, expert: int | None) -> str:
        return key if self.num_experts is None else key.replace("{}", str(expert))

    def _is_apart(self, key: str) -> bool:
        """Whether each expert is written as a separate tensor."""
        return self.num_experts is None or "{}" in key

    def encode(
        self, exact: torch.Tensor, expert: int | None
    ) -> tuple[list[tuple[str, int | None, torch.Tensor]], torch.Tensor]:
        """Rounds the tensor, or the slice of one expert.

        Args:
            exact: fp32, in the tensor's own shape.
            expert: index of the expert; None for a tensor of a single matrix.

        Returns:
            Key, index in the tensor of all experts, and values of each written tensor; and their decoded values, in
            the shape of `exact`.
        """
        found, decoded = [], []
        for key, part in zip(self.keys, self._parts(exact)):
            tensors, values = self.layout.encode(self._key(key, expert), part.contiguous())
            place = None if self._is_apart(key) else expert
            found += [(stored_key, place, tensor) for stored_key, tensor in tensors.items()]
            decoded.append(values)
        whole = torch.cat(decoded)
        return found, (whole if self.is_out_in else whole.T).reshape(exact.shape)

    def _parts(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        matrix = tensor.view(tensor.shape[-2:])
        return (matrix if self.is_out_in else matrix.T).chunk(len(self.keys))

    def differ(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether two tensors, or slices of one expert, are stored as different weights.

        A tiny change of a block's largest weight changes its scale, which alone does not count as a difference.
        """
        for pair in zip(self._parts(one), self._parts(other)):
            # usually the first rows already differ
            for rows in zip(*(part.split(self.layout.whole_rows) for part in pair)):
                left, right = (self.layout.encode(self.keys[0], part.contiguous())[1] for part in rows)
                if ((left - right).abs() > _LEAST_DIFFERENCE * right.abs()).any():
                    return True
        return False


@dataclass
class Encoding:
    """The quantized tensors of a checkpoint.

    Args:
        layout: layout of the output.
        encoders: key -> encoder; other tensors stay in floating point.
        names: the same keys -> names in the model.
        config: the `quantization_config` to write.
        notes: notes for the report.
    """

    layout: EngineLayout
    encoders: dict[str, Encoder] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_encoding(layout: EngineLayout, base: BaseModel, checkpoint: Checkpoint, plan: MergePlan) -> Encoding:
    """Selects the tensors to quantize: all experts, and the other linear layers that engines serve quantized.

    Args:
        layout: layout of the output.
        base: the model.
        checkpoint: its weights, in floating point.
        plan: plan of the merge, with all stacks.

    Raises:
        ValueError: engines cannot read these experts in this layout; the error names the reason.
    """
    encoding = Encoding(layout)
    for stack in plan.stacks:
        _add_stack(encoding, stack, base, checkpoint, plan)
    finder = SourceFinder(base.model, checkpoint)
    linear = _linear_layers(layout, base, checkpoint, finder, encoding.encoders)
    too_narrow = []
    for group in linear:
        sizes = {key: checkpoint.tensors[key].shape for key in group}
        if all(layout.takes_linear(_last_part(key), *size) for key, size in sizes.items()):
            encoding.encoders |= {key: Encoder(layout, (key,), size) for key, size in sizes.items()}
            encoding.names |= {key: finder.name_of(key) for key in group}
        else:
            too_narrow += group
    encoding.config = layout.config(_kept(base, checkpoint, finder, encoding))
    if too_narrow:
        encoding.notes += (
            f"{len(too_narrow)} linear layers stay in floating point, {_module(too_narrow[0])} first: engines do not "
            f"support {layout.storage} for their sizes, or for those of layers that they are fused with.",
        )
    stored = {str(checkpoint.storage_of(key)) for key in encoding.encoders if checkpoint.storage_of(key) is not None}
    if str(layout.storage) in stored:
        encoding.notes += (
            f"The base is already stored as {layout.storage}, and its weights are rounded again: small deltas are "
            "lost. Merging with --quantize keeps more of them.",
        )
    return encoding


def _add_stack(encoding: Encoding, stack: StackEdit, base: BaseModel, checkpoint: Checkpoint, plan: MergePlan) -> None:
    """Adds the tensors of one stack of experts.

    Raises:
        ValueError: engines cannot read them in this layout.
    """
    layout, source = encoding.layout, stack.source
    class_name = base.layouts[source.target.path].class_name
    places = plan.places(source, checkpoint)
    for expert in range(source.target.num_experts):
        for part in source.parts_of_expert(expert, checkpoint, places):
            if part.key in encoding.encoders:
                continue
            rows, columns = part.shape[-2:]
            is_out_in = _is_out_in(stack, part.places)
            if not part.is_stack:
                is_known = is_out_in and layout.takes_single_experts(class_name)
                keys = [part.key] if is_known else None
            else:
                is_known = _are_in_order(source, part.places, (rows, columns), is_out_in)
                keys = layout.keys_of_stack(class_name, part.key, source.target.parts) if is_known else None
            if keys is None:
                raise ValueError(
                    f"{checkpoint.tensors[part.key]} cannot be quantized for serving: the layout that engines read "
                    f"for {class_name} in {layout.storage} is not known. {_WITHOUT}"
                )
            if not is_out_in:
                rows, columns = columns, rows
            shape = (rows // len(keys), columns)
            reason = layout.why_not(*shape)
            if reason is not None:
                raise ValueError(
                    f"Engines do not support experts of this size in {layout.storage}: {part.key} has matrices of "
                    f"{shape[0]} x {shape[1]}, and {reason}. {_WITHOUT}"
                )
            num_experts = source.target.num_experts if part.is_stack else None
            encoding.encoders[part.key] = Encoder(layout, tuple(keys), shape, num_experts, is_out_in)
            encoding.names[part.key] = stack.name


def _is_out_in(stack: StackEdit, places: torch.Tensor) -> bool:
    """Whether the rows of a tensor are output features."""
    return len(stack.features_of(places[:2])) == 1


def _are_in_order(source: DenseSource, places: torch.Tensor, shape: tuple[int, int], is_out_in: bool) -> bool:
    """Whether a tensor has all features of an expert, in the order of the model class."""
    _, rows, columns = source.target.shape
    own = places.view(shape) if is_out_in else places.view(shape).T
    in_class = torch.arange(rows * columns).view(rows, columns)
    return torch.equal(own, in_class.T if source.target.is_transposed else in_class)


def _linear_layers(
    layout: EngineLayout,
    base: BaseModel,
    checkpoint: Checkpoint,
    finder: SourceFinder,
    experts: Mapping[str, Encoder],
) -> Iterator[list[str]]:
    """The keys of the linear layers that engines quantize, grouped by the layers that engines fuse.

    They are in the decoder layers of the text model. Some of them, such as layers for speculative decoding, are not
    part of the transformers model and are selected by name only.
    """
    names = {key: name for name, key in finder.plain_tensors().items()}
    layers = {path.partition("layers.")[0] + "layers." for path in base.layouts}
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    number_of = {name: number for number, group in enumerate(layout.linear) for name in group}
    for key, info in checkpoint.tensors.items():
        path, _, last = _module(key).rpartition(".")
        is_weight = key.endswith(".weight") and len(info.shape) == 2 and info.dtype in QUANTIZABLE_DTYPES
        if not is_weight or last not in number_of or key in experts:
            continue
        name = finder.name_of(key)
        if key in names:
            is_linear = isinstance(base.model.get_submodule(_module(names[key])), nn.Linear)
        else:
            is_linear = name not in finder.names  # otherwise it is part of a larger tensor in the model
        if is_linear and name.startswith(tuple(layers)):
            groups[path, number_of[last]].append(key)
    yield from groups.values()


def _kept(base: BaseModel, checkpoint: Checkpoint, finder: SourceFinder, encoding: Encoding) -> list[str]:
    """The modules whose weights stay in floating point, by their names in the checkpoint.

    Some readers quantize all other modules, so every module with a matrix is listed.
    """
    keys = {name: key for name, key in finder.plain_tensors().items() if key in checkpoint.tensors}
    found = {
        _module(key)
        for key, info in checkpoint.tensors.items()
        if key.endswith(".weight") and len(info.shape) > 1 and key not in encoding.encoders
    }
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" not in keys:
            found.add(name)  # tied to another weight, or part of a larger one
    return sorted(found)


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _last_part(key: str) -> str:
    return _module(key).rpartition(".")[2]
