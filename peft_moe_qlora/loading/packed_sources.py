"""Stacks of weights quantized by other tools: loaded unchanged, or requantized to another storage."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from transformers.core_model_loading import Transpose, WeightConverter

from ..quantization import Format, QuantizedStack, Stack
from .checkpoint import Checkpoint, CheckpointError
from .disk import PackedTensor
from .part_of_experts import Part
from .sources import Source, Sources, Target, check_expert_ids, misfit, num_targets

_REARRANGING = ("MergeModulelist", "Concatenate", "ErnieFuseAndSplitTextVisionExperts")


class PackedSource(Source):
    """Weights quantized by other tools, one tensor per expert and projection, or one for all experts.

    Codes and scales are loaded unchanged; those of gate and up projection are concatenated. 8-bit scales of
    bitsandbytes are decoded, as bitsandbytes does at run time: a stack can store one mean of scales per expert, but
    these checkpoints have one each for gate and up projection.

    Args:
        target: the stack.
        lists: source pattern -> packed tensors in the order of the experts, or a single tensor of all experts.
        converter: converter of transformers' mapping; None if the tensor is the stack.
        turn: index of this stack among the stacks that share the lists.

    Raises:
        CheckpointError: experts are missing, or the codes can't be concatenated without decoding them.
    """

    def __init__(
        self,
        target: Target,
        lists: dict[str, list[PackedTensor]],
        converter: WeightConverter | None,
        turn: int,
    ) -> None:
        super().__init__(target, [key for tensors in lists.values() for tensor in tensors for key in tensor.keys])
        self.patterns, self.lists = list(lists), list(lists.values())
        self.first_expert = turn * target.num_experts
        self.is_fused = len(self.lists[0]) == 1 and len(self.lists[0][0].shape) == 3
        packed = [tensor for tensors in self.lists for tensor in tensors]
        if self.is_fused and len(packed) > 1:
            raise CheckpointError(
                f"{packed[0].key} and {packed[1].key} both belong to the stack {target.name}. Expected one tensor for "
                "all experts. Use the 16-bit checkpoint."
            )
        self.storage = packed[0].storage
        self.description = packed[0].description
        self.can_be_requantized = packed[0].can_be_requantized
        for tensor in packed:
            if tensor.storage != self.storage:
                raise CheckpointError(
                    f"{tensor.key} is stored as {tensor.storage} and {packed[0].key} as {self.storage}. Expected one "
                    f"storage for the stack {target.name}. Use the 16-bit checkpoint."
                )
            if self.is_fused and tensor.shape[0] != target.num_experts:
                raise CheckpointError(
                    f"{tensor.key} contains {tensor.shape[0]} experts. Expected {target.num_experts} for "
                    f"{target.name} of shape {target.shape}. Checkpoint and config do not match; download both again."
                )
        if not self.is_fused:
            for tensors in self.lists:
                check_expert_ids(
                    [tensor.key for tensor in tensors], target.num_experts * num_targets(converter), target
                )
        self.is_transposed = self._orientation(converter)

    def _orientation(self, converter: WeightConverter | None) -> bool:
        """Whether matrices are stored `(in, out)`. Codes can be concatenated, but not rearranged."""
        firsts = [tensors[0 if self.is_fused else self.first_expert] for tensors in self.lists]
        for tensors, first in zip(self.lists, firsts):
            for tensor in tensors[self.first_expert :][: self.target.num_experts]:
                if tensor.shape != first.shape:
                    raise CheckpointError(
                        f"{tensor.key} has shape {list(tensor.shape)} and {first.key} has {list(first.shape)}. "
                        f"Expected equal shapes in the stack {self.target.name}. Download the checkpoint again."
                    )
        operations = [] if converter is None else converter.operations
        unknown = [op for op in operations if type(op).__name__ not in (*_REARRANGING, "Transpose")]
        reason = f"the operation {unknown[0]} would rearrange codes" if unknown else self._why_not_joined(firsts)
        if reason is not None:
            raise CheckpointError(
                f"{firsts[0].key}: {self.target.name} cannot be loaded from quantized weights, because {reason}. Load "
                "the unquantized checkpoint with MoeQuantizationConfig."
            )
        rows, columns = sum(tensor.shape[-2] for tensor in firsts), firsts[0].shape[-1]
        if firsts[0].is_out_in:
            if (rows, columns) != self.target.stored_shape(False)[1:]:
                found = f"{firsts[0].key} and the corresponding tensors (out, in)"
                raise misfit(self.target, converter, self.patterns, found, (rows, columns), False)
            return False
        transposes = [op for op in operations if isinstance(op, Transpose)]
        expected = self.target.shape[1:]
        as_declared = (rows, columns) == expected and (not transposes or transposes[0].check_dims)
        if not as_declared and (not transposes or (columns, rows) != expected):
            found = f"{firsts[0].key} and the corresponding tensors"
            raise misfit(self.target, converter, self.patterns, found, (rows, columns))
        return self.target.is_transposed == as_declared

    def _why_not_joined(self, firsts: list[PackedTensor]) -> str | None:
        """Why codes and scales can't be concatenated along the rows; None if they can."""
        above = firsts if self.is_fused else firsts[:-1]
        reasons = (self.storage.why_not_joined(*tensor.shape[-2:]) for tensor in above)
        reason = next((reason for reason in reasons if reason is not None), None)
        are_parts = firsts[0].is_out_in and not self.is_fused
        if reason is None and are_parts and len(firsts) not in (1, self.target.parts):
            return f"it consists of {len(firsts)} parts, and {self.storage} supports 1 or {self.target.parts} here"
        return reason

    def empty_stack(self, storage: Format | None, dtype: torch.dtype) -> Stack:
        return self.target.empty_stack(self.storage, dtype, self.is_transposed)

    def fill(self, stack: QuantizedStack, checkpoint: Checkpoint, part: Part | None = None) -> None:
        experts = self._experts(stack, part)
        for expert, tensors in zip(experts, self.read_each(checkpoint, experts)):
            stack.set_tensors(expert, tensors)

    def read_each(self, checkpoint: Checkpoint, experts: range | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the stored tensors of each expert, by the format's names, on the CPU.

        Args:
            checkpoint: the checkpoint.
            experts: indices of the experts; None for all.

        Raises:
            CheckpointError: see `PackedTensor.read`.
        """
        experts = range(self.target.num_experts) if experts is None else experts
        if self.is_fused:
            yield from islice(self.lists[0][0].read_each(checkpoint), experts.start, experts.stop)
            return
        for expert in experts:
            parts = [tensors[self.first_expert + expert].read(checkpoint) for tensors in self.lists]
            yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class RequantizedSource(Source):
    """Weights quantized by other tools that are requantized to another format, one expert at a time.

    Args:
        packed: source of the quantized weights.
    """

    def __init__(self, packed: PackedSource) -> None:
        super().__init__(packed.target, packed.keys)
        self.packed = packed

    def empty_stack(self, storage: Format | None, dtype: torch.dtype) -> Stack:
        return self.target.empty_stack_as_declared(storage, dtype)

    def fill(self, stack: Stack, checkpoint: Checkpoint, part: Part | None = None) -> None:
        device, experts = (part and part.device) or stack.device, self._experts(stack, part)
        storage, is_transposed = self.packed.storage, self.packed.is_transposed
        rows, columns = self.target.stored_shape(is_transposed)[1:]
        for expert, tensors in zip(experts, self.packed.read_each(checkpoint, experts)):
            on_device = {name: tensor[None].to(device) for name, tensor in tensors.items()}
            matrix = storage.dequantize(on_device, rows, columns, stack.dtype, self.target.parts)[0]
            try:
                stack.set_expert(expert, matrix if is_transposed == stack.is_transposed else matrix.T)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.target.name} cannot be stored: {error} It is loaded from {self.keys[0]} and the "
                    "corresponding tensors."
                ) from error


def requantized(sources: Sources, storage: Format | None) -> Sources:
    """Replaces the sources of quantized weights in another storage by sources that requantize them.

    Args:
        sources: path -> projection -> source.
        storage: the requested storage format.
    """

    def replace(source: Source) -> Source:
        is_packed = isinstance(source, PackedSource) and source.can_be_requantized
        return RequantizedSource(source) if is_packed and source.storage != storage else source

    return {path: {name: replace(one) for name, one in of_module.items()} for path, of_module in sources.items()}
