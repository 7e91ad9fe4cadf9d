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
    """Weights quantized by other tools, one for each expert and projection or one for all experts.

    Codes and scales are loaded unchanged, those of gate and up projection concatenated. bitsandbytes' scales in 8 bits
    are decoded, as it does at run time: a stack has one mean of scales per expert, but here each half has one.

    Args:
        target: the stack.
        lists: source pattern -> packed tensors in the order of the experts; a single one may stand for all.
        converter: of transformers' mapping; None where the tensor is the stack.
        turn: which of the stacks that share the lists this is, counted from 0.

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
                f"{packed[0].key} and {packed[1].key} are both of the stack {target.name}, of which one for all "
                "experts was expected."
            )
        self.storage = packed[0].storage
        self.description = packed[0].description
        self.can_be_requantized = packed[0].can_be_requantized
        for tensor in packed:
            if tensor.storage != self.storage:
                raise CheckpointError(
                    f"{tensor.key} is stored as {tensor.storage} and {packed[0].key} as {self.storage}, but both are "
                    f"of the stack {target.name}."
                )
            if self.is_fused and tensor.shape[0] != target.num_experts:
                raise CheckpointError(
                    f"{tensor.key} holds {tensor.shape[0]} experts; {target.name} has {target.shape}."
                )
        if not self.is_fused:
            for tensors in self.lists:
                check_expert_ids(
                    [tensor.key for tensor in tensors], target.num_experts * num_targets(converter), target
                )
        self.is_transposed = self._orientation(converter)

    def _orientation(self, converter: WeightConverter | None) -> bool:
        """How a matrix is stored, given that codes can be concatenated but not rearranged."""
        firsts = [tensors[0 if self.is_fused else self.first_expert] for tensors in self.lists]
        for tensors, first in zip(self.lists, firsts):
            for tensor in tensors[self.first_expert :][: self.target.num_experts]:
                if tensor.shape != first.shape:
                    raise CheckpointError(
                        f"{tensor.key} is of shape {list(tensor.shape)} and {first.key} of {list(first.shape)}, but "
                        f"both are of the stack {self.target.name}."
                    )
        operations = [] if converter is None else converter.operations
        unknown = [op for op in operations if type(op).__name__ not in (*_REARRANGING, "Transpose")]
        what = f"the operation {unknown[0]}" if unknown else self._why_not_joined(firsts)
        if what is not None:
            raise CheckpointError(
                f"{firsts[0].key}: {self.target.name} can't be made of packed weights because of {what}. Load the "
                "unquantized checkpoint with MoeQuantizationConfig."
            )
        rows, columns = sum(tensor.shape[-2] for tensor in firsts), firsts[0].shape[-1]
        if firsts[0].is_out_in:
            if (rows, columns) != self.target.stored_shape(False)[1:]:
                found = f"{firsts[0].key} and its like, (out, in) each,"
                raise misfit(self.target, converter, self.patterns, found, (rows, columns), False)
            return False
        transposes = [op for op in operations if isinstance(op, Transpose)]
        expected = self.target.shape[1:]
        as_declared = (rows, columns) == expected and (not transposes or transposes[0].check_dims)
        if not as_declared and (not transposes or (columns, rows) != expected):
            raise misfit(self.target, converter, self.patterns, f"{firsts[0].key} and its like", (rows, columns))
        return self.target.is_transposed == as_declared

    def _why_not_joined(self, firsts: list[PackedTensor]) -> str | None:
        """Why codes and scales can't be concatenated along the rows; None if they can."""
        above = firsts if self.is_fused else firsts[:-1]
        reasons = (self.storage.why_not_joined(*tensor.shape[-2:]) for tensor in above)
        reason = next((reason for reason in reasons if reason is not None), None)
        are_parts = firsts[0].is_out_in and not self.is_fused
        if reason is None and are_parts and len(firsts) not in (1, self.target.parts):
            return f"its {len(firsts)} parts, where blocks of {self.storage} may span {self.target.parts}"
        return reason

    def empty_stack(self, storage: Format | None, dtype: torch.dtype) -> Stack:
        return self.target.empty_stack(self.storage, dtype, self.is_transposed)

    def fill(self, stack: QuantizedStack, checkpoint: Checkpoint, part: Part | None = None) -> None:
        experts = self._experts(stack, part)
        for expert, tensors in zip(experts, self.read_each(checkpoint, experts)):
            stack.set_tensors(expert, tensors)

    def read_each(self, checkpoint: Checkpoint, experts: range | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """What is stored of each expert, by the format's names, on the CPU.

        Args:
            checkpoint: where the keys are.
            experts: their numbers; None for all.

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
    """Weights quantized by other tools, decoded one expert at a time and stored in another format.

    Args:
        packed: where they come from.
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
                    f"{self.target.name} can't be stored: {error} It comes from {self.keys[0]} and its like."
                ) from error


def requantized(sources: Sources, storage: Format | None) -> Sources:
    """Sources of the same stacks; those of quantized weights that are in another storage are decoded.

    Args:
        sources: path -> projection -> source.
        storage: that was asked for.
    """

    def replace(source: Source) -> Source:
        is_packed = isinstance(source, PackedSource) and source.can_be_requantized
        return RequantizedSource(source) if is_packed and source.storage != storage else source

    return {path: {name: replace(one) for name, one in of_module.items()} for path, of_module in sources.items()}
