"""Sources of stacks: the tensors of a checkpoint that a stack is loaded from, and how they are combined.

transformers has a conversion mapping from the checkpoints of each architecture to fused parameters, which renames keys
and lists operations on the tensors. This module applies the same mapping to one expert at a time, so a full 16-bit
stack never exists. Keys of quantized weights are mapped like the keys that they replace.
"""

from __future__ import annotations

import copy
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.core_model_loading import WeightConverter

from ..quantization import QUANTIZABLE_DTYPES, DenseStack, Format, QuantizedStack, Stack
from .checkpoint import Checkpoint, CheckpointError
from .part_of_experts import Part


@dataclass(frozen=True)
class Target:
    """A stack of the model.

    Args:
        path: path of the experts module.
        projection: name of the stack.
        shape: `(E, rows, columns)` of the class's parameter.
        is_transposed: as declared by the class.
        dtype: dtype of the model's parameter.
        parts: number of `(out, in)` matrices in the matrix of an expert, such as gate and up.
    """

    path: str
    projection: str
    shape: tuple[int, int, int]
    is_transposed: bool
    dtype: torch.dtype
    parts: int = 1

    @property
    def name(self) -> str:
        return f"{self.path}.{self.projection}"

    @property
    def num_experts(self) -> int:
        return self.shape[0]

    def stored_shape(self, is_transposed: bool) -> torch.Size:
        """`(E, rows, columns)` of a stack stored in the given orientation."""
        num_experts, rows, columns = self.shape
        return torch.Size(self.shape if is_transposed == self.is_transposed else (num_experts, columns, rows))

    def empty_stack(self, storage: Format, dtype: torch.dtype, is_transposed: bool) -> QuantizedStack:
        """A quantized stack on the meta device, stored in the given orientation."""
        return QuantizedStack(self.stored_shape(is_transposed), dtype, is_transposed, storage, "meta", self.parts)

    def empty_stack_as_declared(self, storage: Format | None, dtype: torch.dtype) -> Stack:
        """A stack on the meta device, in the class's orientation if possible; without a storage, in `dtype`."""
        if storage is None:
            return DenseStack(torch.empty(self.shape, dtype=dtype, device="meta"), self.is_transposed)
        return self.empty_stack(storage, dtype, self.is_transposed and not storage.is_out_in)


class Source(ABC):
    """The tensors of a checkpoint that a stack is loaded from.

    Args:
        target: the stack.
        keys: keys of all tensors of the stack.
    """

    def __init__(self, target: Target, keys: Sequence[str]) -> None:
        self.target = target
        self.keys = list(keys)
        self.is_shared = False
        """Whether other stacks are tied to this one. transformers' loader then reports their names as missing and
        overwrites the loaded values."""

    @abstractmethod
    def empty_stack(self, storage: Format | None, dtype: torch.dtype) -> Stack:
        """An empty stack for this source on the meta device.

        Args:
            storage: storage format for experts in floating point; None for `dtype`.
            dtype: dtype of the model.
        """

    @abstractmethod
    def fill(self, stack: Stack, checkpoint: Checkpoint, part: Part | None = None) -> None:
        """Reads and stores one expert after the other.

        Args:
            stack: stack to fill, not on the meta device.
            checkpoint: the checkpoint.
            part: experts to read; None for all.
        """

    def _experts(self, stack: Stack, part: Part | None) -> range:
        """The indices of the experts to read, which are recorded in the stack."""
        if part is None:
            return range(self.target.num_experts)
        stack.experts_read = part.experts(self.target.num_experts)
        return stack.experts_read


class NativeSource(Source):
    """Codes and scales written by `save_pretrained`, which transformers' loader reads unchanged.

    Args:
        target: the stack.
        tensors: name in the model -> key in the checkpoint.
        is_flipped: whether matrices are stored in the opposite orientation to the class.
    """

    def __init__(self, target: Target, tensors: dict[str, str], is_flipped: bool) -> None:
        super().__init__(target, list(tensors.values()))
        self.tensors = tensors
        self.is_transposed = target.is_transposed != is_flipped

    def empty_stack(self, storage: Format | None, dtype: torch.dtype) -> Stack:
        return self.target.empty_stack(storage, dtype, self.is_transposed)

    def check(self, stack: Stack, checkpoint: Checkpoint) -> None:
        """Checks that all tensors of the stack are present and match it.

        Args:
            stack: an empty stack of this source.
            checkpoint: the checkpoint.

        Raises:
            CheckpointError: a tensor is missing, or has another shape or dtype.
        """
        for name, parameter in stack.named_parameters():
            key = self.tensors.get(f"{self.target.name}.{name}")
            if key is None:
                raise CheckpointError(
                    f"The checkpoint has {self.keys[0]}, but not {self.target.name}.{name} of the same stack. It is "
                    "incomplete; save or download it again."
                )
            info = checkpoint.tensors[key]
            if info.shape != tuple(parameter.shape) or info.dtype != parameter.dtype:
                raise CheckpointError(
                    f"{info} does not match a stack of shape {tuple(stack.shape)} stored as "
                    f"{stack.storage or stack.dtype}. Expected {parameter.dtype} {list(parameter.shape)}. Save or "
                    "download the checkpoint again."
                )

    def fill(self, stack: Stack, checkpoint: Checkpoint, part: Part | None = None) -> None:
        if self.is_shared:
            self.copy_into(stack, checkpoint)

    @torch.no_grad()
    def copy_into(self, stack: Stack, checkpoint: Checkpoint) -> None:
        """Copies the tensors, as transformers' loader does."""
        for name, parameter in stack.named_parameters():
            parameter.copy_(checkpoint.read(self.tensors[f"{self.target.name}.{name}"]))


@dataclass(frozen=True)
class ExpertPart:
    """A tensor of a checkpoint, or a slice of it, as a rearranged part of an expert's matrix.

    Args:
        key: key of the tensor.
        is_stack: whether the tensor contains all experts, `(E, ...)`; the part is then one slice.
        shape: shape of the tensor, or of the slice with a leading 1.
        places: `(numel,)` int64: index of each of its elements in the flattened matrix.
    """

    key: str
    is_stack: bool
    shape: tuple[int, ...]
    places: torch.Tensor

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """Extracts the part from a `(rows, columns)` matrix, in the order and shape of the tensor."""
        return matrix.flatten()[self.places].view(self.shape)


Places = dict[int, torch.Tensor]
"""Index of a tensor among those of an expert -> `ExpertPart.places`."""


class DenseSource(Source):
    """Floating-point tensors, one per expert or one for all, and the operations that combine them to a stack.

    Args:
        target: the stack.
        lists: source pattern -> keys in the order of the experts, or the single key of a 3-D tensor of all experts.
        converter: converter of transformers' mapping; None if the tensor is the stack.
        config: config of the model, which operations may query.
        checkpoint: the checkpoint.
        turn: index of this stack among the stacks that share the lists.

    Raises:
        CheckpointError: experts are missing, or the result does not have the shape of the stack.
    """

    def __init__(
        self,
        target: Target,
        lists: dict[str, list[str]],
        converter: WeightConverter | None,
        config: object,
        checkpoint: Checkpoint,
        turn: int,
    ) -> None:
        super().__init__(target, [key for keys in lists.values() for key in keys])
        self.lists = lists
        self.first_expert = turn * target.num_experts
        self.converter = converter
        self.config = config
        self._check(checkpoint)

    def _check(self, checkpoint: Checkpoint) -> None:
        count = self.target.num_experts * num_targets(self.converter)
        for keys in self.lists.values():
            infos = [checkpoint.tensors[key] for key in keys]
            if len(infos) == count:
                infos = infos[self.first_expert :][: self.target.num_experts]
            for info in infos:
                if info.dtype not in QUANTIZABLE_DTYPES:
                    raise CheckpointError(
                        f"{info} has a dtype that is not supported for experts. Expected F16, BF16 or F32, or a "
                        "quantized weight in a format listed in docs/formats.md. Use the 16-bit checkpoint."
                    )
                if len(info.shape) not in (2, 3):
                    raise CheckpointError(
                        f"{info}: expected a matrix, or a 3-D tensor of one matrix per expert. Use the original "
                        "checkpoint of the model."
                    )
                if info.shape != infos[0].shape:
                    raise CheckpointError(
                        f"{info} and {infos[0]} belong to one stack, but differ in shape. Expected equal shapes. "
                        "Download the checkpoint again."
                    )
            if len(infos[0].shape) == 3:
                if len(keys) > 1 or infos[0].shape[0] != self.target.num_experts:
                    raise CheckpointError(
                        f"{infos[0]}: expected one tensor of {self.target.num_experts} experts for "
                        f"{self.target.name}, found {len(keys)} of {infos[0].shape[0]} experts. Checkpoint and config "
                        "do not match; download both again."
                    )
            else:
                check_expert_ids(keys, count, self.target)
        self._is_stack = {key: len(checkpoint.tensors[key].shape) == 3 for key in self.keys}
        examples = ", ".join(str(checkpoint.tensors[keys[0]]) for keys in self.lists.values())
        try:
            found = self._matrix(0, lambda key: torch.empty(self._read_shape(checkpoint, key), device="meta"))
        except (IndexError, RuntimeError, ValueError) as error:  # some operations need all of their tensors
            raise misfit(self.target, self.converter, self.lists, examples, None) from error
        if tuple(found.shape) != self.target.shape[1:]:
            raise misfit(self.target, self.converter, self.lists, examples, tuple(found.shape))

    def empty_stack(self, storage: Format | None, dtype: torch.dtype) -> Stack:
        return self.target.empty_stack_as_declared(storage, dtype)

    def fill(self, stack: Stack, checkpoint: Checkpoint, part: Part | None = None) -> None:
        device = (part and part.device) or stack.device
        for expert in self._experts(stack, part):
            matrix = self.read_expert(expert, checkpoint).to(device, stack.dtype)
            if stack.is_transposed != self.target.is_transposed:
                matrix = matrix.T
            try:
                stack.set_expert(expert, matrix)
            except ValueError as error:
                at = self.first_expert + expert
                keys = [keys[0] if len(keys) == 1 else keys[at] for keys in self.lists.values()]
                files = {checkpoint.tensors[key].file.name for key in keys}
                raise CheckpointError(
                    f"{self.target.name} cannot be stored: {error} It is loaded from {', '.join(keys)} in "
                    f"{', '.join(sorted(files))}."
                ) from error

    def read_expert(self, expert: int, checkpoint: Checkpoint) -> torch.Tensor:
        """The `(rows, columns)` matrix of an expert on the CPU, in the checkpoint's dtype."""

        def read(key: str) -> torch.Tensor:
            return checkpoint.read_slice(key, expert) if self._is_stack[key] else checkpoint.read(key)

        return self._matrix(expert, read)

    def parts_of_expert(self, expert: int, checkpoint: Checkpoint, places: Places) -> list[ExpertPart]:
        """The tensors or slices from which an expert's matrix is rearranged.

        Args:
            expert: index of the expert in the stack.
            checkpoint: the checkpoint.
            places: result of `find_places`.
        """
        keys = [key for keys in self.lists.values() for key in self._keys_of(expert, keys)]
        return [
            ExpertPart(keys[number], self._is_stack[keys[number]], self._read_shape(checkpoint, keys[number]), of_part)
            for number, of_part in places.items()
        ]

    def keys_of_expert(self, expert: int) -> list[str]:
        """Keys of the tensors from which an expert's matrix is computed."""
        return [key for keys in self.lists.values() for key in self._keys_of(self.first_expert + expert, keys)]

    def find_places(self, checkpoint: Checkpoint) -> Places:
        """The positions of an expert's tensors in its matrix, the same for all experts.

        Raises:
            CheckpointError: the matrix is not a rearrangement of the tensors.
        """
        keys = [key for keys in self.lists.values() for key in self._keys_of(0, keys)]
        counts = [math.prod(self._read_shape(checkpoint, key)) for key in keys]
        starts = [sum(counts[:number]) for number in range(len(keys))]

        def number_elements(key: str) -> torch.Tensor:
            start, count = starts[keys.index(key)], counts[keys.index(key)]
            return torch.arange(start, start + count).view(self._read_shape(checkpoint, key))

        # the operations are applied to numbered elements, whose order in the result shows the rearrangement
        origins = self._matrix(0, number_elements).flatten()
        if origins.bincount(minlength=sum(counts)).max() > 1:
            raise CheckpointError(
                f"{self.target.name} is computed from {keys[0]} and the corresponding tensors. Expected a "
                "rearrangement, which can be reversed. Load base and adapter, and call merge_and_unload(dtype=...)."
            )
        found = {}
        for number, (key, start, count) in enumerate(zip(keys, starts, counts)):
            taken = ((origins >= start) & (origins < start + count)).nonzero()[:, 0]
            if len(taken) not in (0, count):
                raise CheckpointError(
                    f"{self.target.name} contains only some elements of {key}. Expected all or none, because the "
                    "tensor is written as a whole. Load base and adapter, and call merge_and_unload(dtype=...)."
                )
            if len(taken):
                found[number] = torch.empty(count, dtype=torch.int64)
                found[number][origins[taken] - start] = taken
        return found

    def _read_shape(self, checkpoint: Checkpoint, key: str) -> tuple[int, ...]:
        shape = checkpoint.tensors[key].shape
        return (1, *shape[1:]) if self._is_stack[key] else shape

    def _keys_of(self, expert: int, keys: list[str]) -> list[str]:
        # where several stacks share a list, the experts of one follow those of the other
        return keys if len(keys) == 1 else keys[expert :: self.target.num_experts]

    def _matrix(self, expert: int, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        tensors = {pattern: [read(key) for key in self._keys_of(expert, keys)] for pattern, keys in self.lists.items()}
        if self.converter is None:
            return next(iter(tensors.values()))[0][0]
        converter = copy.deepcopy(self.converter)
        for pattern, parts in tensors.items():
            for part in parts:
                converter.add_tensor(self.target.name, pattern, pattern, part)
        made = converter.convert(self.target.name, model=_OneExpert(self.target), config=self.config)
        return made[self.target.name][0]


Sources = dict[str, dict[str, Source]]
"""Path of an experts module -> projection -> source of the stack."""


def each_source(sources: Sources) -> Iterator[Source]:
    return (source for of_module in sources.values() for source in of_module.values())


def check_expert_ids(keys: list[str], count: int, target: Target) -> None:
    """Checks that a list of keys contains every expert once.

    Raises:
        CheckpointError: an expert is missing, unexpected or repeated; the error names the first.
    """
    ids = [_expert_id(key) for key in keys]
    if ids == list(range(count)):
        return
    missing = sorted(set(range(count)) - set(ids))
    if missing:
        raise CheckpointError(
            f"{target.name} has {count} experts, but the checkpoint lacks expert {missing[0]} next to {keys[0]} "
            f"({len(missing)} of {count} missing). Download the checkpoint again, or correct the number of experts in "
            "config.json."
        )
    extra = next(key for key, expert in zip(keys, ids) if expert not in range(count) or ids.count(expert) > 1)
    raise CheckpointError(
        f"{extra} is not one of the {count} experts of {target.name}, or is repeated. Checkpoint and config do not "
        "match; download both again."
    )


def _expert_id(key: str) -> int:
    """The number after `experts`, or the last one."""
    found = re.search(r"experts\.(\d+)\.", key) or re.search(r".*\.(\d+)\.", key)
    return int(found.group(1)) if found else 0


def misfit(
    target: Target,
    converter: WeightConverter | None,
    patterns: Iterable[str],
    examples: str,
    shape: tuple[int, ...] | None,
    is_transposed: bool | None = None,
) -> CheckpointError:
    """The error for tensors whose combination does not have the shape of a stack.

    Args:
        target: the stack.
        converter: converter of transformers' mapping.
        patterns: source patterns for which the checkpoint has tensors.
        examples: description of the tensors.
        shape: shape of their combination; None if they can't be combined.
        is_transposed: expected orientation; None for that of the class.
    """
    expected = target.stored_shape(target.is_transposed if is_transposed is None else is_transposed)[1:]
    sources = [] if converter is None else converter.source_patterns
    missing = [pattern for pattern in sources if pattern not in patterns]
    if missing:
        return CheckpointError(
            f"The checkpoint has no tensors {', '.join(missing)} for {target.name}, expected in addition to "
            f"{examples}. It is incomplete; download it again."
        )
    found = "cannot be combined into experts" if shape is None else f"give experts of shape {shape}"
    return CheckpointError(
        f"{examples} {found} for {target.name}. Expected shape {tuple(expected)}. Checkpoint and config do not match; "
        "download both again."
    )


class _OneExpert:
    """Stand-in for the model when an operation queries the shape of its result, here of one expert."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty((1, *self.target.shape[1:]), device="meta")


def num_targets(converter: WeightConverter | None) -> int:
    return 1 if converter is None else len(converter.target_patterns)
