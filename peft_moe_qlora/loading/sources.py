"""Maps the tensors of a checkpoint to the stacks of a model, from the headers alone.

transformers knows how the checkpoints of each architecture become fused parameters: its conversion mapping renames
keys and lists operations on the tensors. Here the same mapping is applied to one expert at a time, so that a stack
never exists in 16 bits. Keys of weights packed by bitsandbytes are mapped like the keys that they replace.
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
        path: of the experts module.
        projection: name of the stack.
        shape: `(E, rows, columns)` as the class has it.
        is_transposed: as the class declares.
        dtype: of the model's parameter.
        parts: matrices, `(out, in)` each, that one is made of, such as gate and up.
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
        """`(E, rows, columns)` of a stack that is stored in one orientation or the other."""
        num_experts, rows, columns = self.shape
        return torch.Size(self.shape if is_transposed == self.is_transposed else (num_experts, columns, rows))

    def empty_stack(self, storage: Format, dtype: torch.dtype, is_transposed: bool) -> QuantizedStack:
        """A stack on the meta device that is stored in one orientation or the other."""
        return QuantizedStack(self.stored_shape(is_transposed), dtype, is_transposed, storage, "meta", self.parts)

    def empty_stack_as_declared(self, storage: Format | None, dtype: torch.dtype) -> Stack:
        """A stack on the meta device, in the class's orientation if possible; storage None for one in `dtype`."""
        if storage is None:
            return DenseStack(torch.empty(self.shape, dtype=dtype, device="meta"), self.is_transposed)
        return self.empty_stack(storage, dtype, self.is_transposed and not storage.is_out_in)


class Source(ABC):
    """Where a stack comes from.

    Args:
        target: the stack.
        keys: all tensors of the checkpoint that it takes.
    """

    def __init__(self, target: Target, keys: Sequence[str]) -> None:
        self.target = target
        self.keys = list(keys)
        self.is_shared = False
        """Whether other stacks are tied to this one. transformers' loader takes their names for missing ones and wipes
        what it has loaded."""

    @abstractmethod
    def empty_stack(self, storage: Format | None, dtype: torch.dtype) -> Stack:
        """A stack of the right kind and size on the meta device.

        Args:
            storage: what the experts of unquantized checkpoints are to be stored as; None for `dtype`.
            dtype: of the model.
        """

    @abstractmethod
    def fill(self, stack: Stack, checkpoint: Checkpoint, part: Part | None = None) -> None:
        """Reads and stores one expert after the other.

        Args:
            stack: on a real device.
            checkpoint: where the keys are.
            part: which of the experts; None for all.
        """

    def _experts(self, stack: Stack, part: Part | None) -> range:
        """The indices of the experts to read, which the stack records."""
        if part is None:
            return range(self.target.num_experts)
        stack.experts_read = part.experts(self.target.num_experts)
        return stack.experts_read


class NativeSource(Source):
    """Codes and scales as `save_pretrained` writes them; transformers' loader takes them as they are.

    Args:
        target: the stack.
        tensors: name in the model -> key in the checkpoint.
        is_flipped: whether matrices are stored in the other orientation than the class has.
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
            stack: an empty one.
            checkpoint: where the keys are.

        Raises:
            CheckpointError: a tensor is missing or of another shape or dtype.
        """
        for name, parameter in stack.named_parameters():
            key = self.tensors.get(f"{self.target.name}.{name}")
            if key is None:
                raise CheckpointError(
                    f"The checkpoint has {self.keys[0]}, but not {self.target.name}.{name}, which belongs to it."
                )
            info = checkpoint.tensors[key]
            if info.shape != tuple(parameter.shape) or info.dtype != parameter.dtype:
                raise CheckpointError(
                    f"{info} doesn't fit the stack {tuple(stack.shape)} stored as {stack.storage or stack.dtype}: "
                    f"{parameter.dtype} {list(parameter.shape)} was expected."
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
    """One tensor of a checkpoint, or a slice of it, as a rearranged part of an expert's matrix.

    Args:
        key: of the tensor.
        is_stack: whether it holds all experts, `(E, ...)`; the part then is one slice.
        shape: of the tensor, or of the slice with a leading 1.
        places: `(numel,)` int64: where in the flattened matrix each of its elements is.
    """

    key: str
    is_stack: bool
    shape: tuple[int, ...]
    places: torch.Tensor

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """The part of a `(rows, columns)` matrix, in the tensor's own order."""
        return matrix.flatten()[self.places].view(self.shape)


Places = dict[int, torch.Tensor]
"""Number of a tensor among those of an expert -> `ExpertPart.places`."""


class DenseSource(Source):
    """Floating-point tensors, one for each expert or one for all, and the operations that make a stack of them.

    Args:
        target: the stack.
        lists: source pattern -> keys, in the order of the experts; a single key of a 3-D tensor stands for all.
        converter: of transformers' mapping; None where the tensor is the stack.
        config: of the model, which operations may query.
        checkpoint: where the keys are.
        turn: which of the stacks that share the lists this is, counted from 0.

    Raises:
        CheckpointError: experts are missing, or the result doesn't have the shape of the stack.
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
                        f"{info} is in a storage that is not known for experts; floating point, or 4 bits by "
                        "bitsandbytes, was expected."
                    )
                if len(info.shape) not in (2, 3):
                    raise CheckpointError(f"{info}: one matrix, or one of each expert, was expected.")
                if info.shape != infos[0].shape:
                    raise CheckpointError(f"{info} differs in shape from {infos[0]}, but both are of one stack.")
            if len(infos[0].shape) == 3:
                if len(keys) > 1 or infos[0].shape[0] != self.target.num_experts:
                    raise CheckpointError(
                        f"{infos[0]}: one tensor for {self.target.num_experts} experts was expected for "
                        f"{self.target.name}, found {len(keys)}."
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
                    f"{self.target.name} can't be stored: {error} It comes from {', '.join(keys)} in "
                    f"{', '.join(sorted(files))}."
                ) from error

    def read_expert(self, expert: int, checkpoint: Checkpoint) -> torch.Tensor:
        """`(rows, columns)` on the CPU, in the checkpoint's dtype."""

        def read(key: str) -> torch.Tensor:
            return checkpoint.read_slice(key, expert) if self._is_stack[key] else checkpoint.read(key)

        return self._matrix(expert, read)

    def parts_of_expert(self, expert: int, checkpoint: Checkpoint, places: Places) -> list[ExpertPart]:
        """The tensors, or slices of such, that an expert's matrix is rearranged from.

        Args:
            expert: its number in the stack.
            checkpoint: where the keys are.
            places: of this stack.
        """
        keys = [key for keys in self.lists.values() for key in self._keys_of(expert, keys)]
        return [
            ExpertPart(keys[number], self._is_stack[keys[number]], self._read_shape(checkpoint, keys[number]), of_part)
            for number, of_part in places.items()
        ]

    def keys_of_expert(self, expert: int) -> list[str]:
        """The tensors that an expert's matrix is made of."""
        return [key for keys in self.lists.values() for key in self._keys_of(self.first_expert + expert, keys)]

    def find_places(self, checkpoint: Checkpoint) -> Places:
        """Where the tensors of an expert are in its matrix, the same for all experts.

        Raises:
            CheckpointError: the matrix is not a rearrangement of them.
        """
        keys = [key for keys in self.lists.values() for key in self._keys_of(0, keys)]
        counts = [math.prod(self._read_shape(checkpoint, key)) for key in keys]
        starts = [sum(counts[:number]) for number in range(len(keys))]

        def number_elements(key: str) -> torch.Tensor:
            start, count = starts[keys.index(key)], counts[keys.index(key)]
            return torch.arange(start, start + count).view(self._read_shape(checkpoint, key))

        # the operations are applied to numbered elements, which then show the rearrangement
        origins = self._matrix(0, number_elements).flatten()
        if origins.bincount(minlength=sum(counts)).max() > 1:
            raise CheckpointError(f"{self.target.name} is computed from {keys[0]} and its like, not rearranged.")
        found = {}
        for number, (key, start, count) in enumerate(zip(keys, starts, counts)):
            taken = ((origins >= start) & (origins < start + count)).nonzero()[:, 0]
            if len(taken) not in (0, count):
                raise CheckpointError(f"{self.target.name} takes a part of {key} only, which can't be changed alone.")
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
"""Path of an experts module -> projection -> where its stack comes from."""


def each_source(sources: Sources) -> Iterator[Source]:
    return (source for of_module in sources.values() for source in of_module.values())


def check_expert_ids(keys: list[str], count: int, target: Target) -> None:
    """Checks that a list of keys has every expert once.

    Raises:
        CheckpointError: names the first that is missing, or too many.
    """
    ids = [_expert_id(key) for key in keys]
    if ids == list(range(count)):
        return
    missing = sorted(set(range(count)) - set(ids))
    if missing:
        raise CheckpointError(
            f"{target.name} has {count} experts, but the checkpoint lacks expert {missing[0]} beside {keys[0]} "
            f"({len(missing)} of {count} missing)."
        )
    extra = next(key for key, expert in zip(keys, ids) if expert not in range(count) or ids.count(expert) > 1)
    raise CheckpointError(f"{extra} is not one of the {count} experts of {target.name}, or there twice.")


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
    """The error for tensors that yield matrices of `shape`, or none, instead of the stack's.

    `is_transposed` is the expected orientation; None for that of the class.
    """
    expected = target.stored_shape(target.is_transposed if is_transposed is None else is_transposed)[1:]
    sources = [] if converter is None else converter.source_patterns
    missing = [pattern for pattern in sources if pattern not in patterns]
    if missing:
        return CheckpointError(
            f"{target.name} needs tensors {', '.join(missing)} beside {examples}; the checkpoint has none."
        )
    found = "can't be combined into experts" if shape is None else f"give experts of shape {shape}"
    return CheckpointError(
        f"{examples} {found} for {target.name}; {tuple(expected)} was expected. Checkpoint and config don't belong "
        "together."
    )


class _OneExpert:
    """Stand-in for the model when an operation queries the shape of its result: that of one expert."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty((1, *self.target.shape[1:]), device="meta")


def num_targets(converter: WeightConverter | None) -> int:
    return 1 if converter is None else len(converter.target_patterns)
