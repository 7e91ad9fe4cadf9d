"""Names and layout of a model's weights in its original checkpoint, for single tensors or a few."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightTransform, revert_weight_conversion


class CheckpointNames:
    """transformers' reverse mapping from a model to its checkpoint, computed once for many tensors.

    Args:
        model: model whose parameters are mapped; adapters and quantization may have replaced its modules.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        loaded = [_facts(one) for one in model.__dict__.get("_weight_conversions") or ()]
        # restores a prefix that loading has removed, as for the text model of a multimodal checkpoint
        self._conversions = [
            one
            for one in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(one, PrefixChange) or _facts(one) in loaded
        ]
        reversed_ones = [one.reverse_transform() for one in self._conversions[::-1]]
        self._converters = [one for one in reversed_ones if isinstance(one, WeightConverter)]

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Groups names whose tensors can only be converted together."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._first_key(name) or name, []).append(name)
        return list(found.values())

    def is_plain(self, name: str) -> bool:
        """Whether the checkpoint has the same tensor, possibly under another name."""
        return self._first_key(name) is None

    def _first_key(self, name: str) -> str | None:
        for converter in self._converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return renamed
        return None

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Converts one group to the names and layout of the checkpoint.

        Raises:
            ValueError: transformers can't convert the tensors for the model in its current state.
        """
        try:
            return revert_weight_conversion(_Stand(self._conversions, self.model, tensors), dict(tensors))
        except (AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{', '.join(tensors)} cannot be converted to the layout of the checkpoint: {error}. Merge the "
                "adapter into a new checkpoint (peft-moe-qlora merge), and load that."
            ) from error

    def keys(self, names: Iterable[str]) -> dict[str, str]:
        """Name -> key of plain tensors. Pass all at once, because some renamings depend on several of them."""
        in_order = list(names)
        found = self.convert({name: torch.tensor([number]) for number, name in enumerate(in_order)})
        return {in_order[number.item()]: key for key, number in found.items()}

    def of_parts(self, name: str, num_experts: int, num_parts: int) -> list[str] | None:
        """The keys of all parts of a stack, expert by expert, gate before up; None if a part is not a tensor.

        Args:
            name: name of the stack.
            num_experts: number of experts in the stack.
            num_parts: number of matrices of equal size, stacked along the rows, in the matrix of an expert.
        """
        # numbers replace the weights, 2 x 2 for each part, and show the mapping in the converted tensors
        numbers = torch.arange(num_experts * num_parts * 4).view(num_experts, -1, 2)
        try:
            converted = self.convert({name: numbers})
        except ValueError:  # operations that need the shape of a parameter, or several stacks at once
            return None
        in_order = sorted(converted, key=lambda key: converted[key].flatten()[0].item())
        parts = numbers.view(-1, 2, 2)
        if len(in_order) != len(parts) or any(not torch.equal(converted[k], part) for k, part in zip(in_order, parts)):
            return None
        return in_order


class _Stand:
    """Stand-in for the model when transformers reverts conversions.

    A quantized model has no parameters with the names of its experts' weights.
    """

    def __init__(
        self, conversions: list[WeightTransform], model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self._weight_conversions = conversions
        self.config = model.config
        self._model, self._tensors = model, tensors

    def get_parameter(self, name: str) -> torch.Tensor:
        """A tensor whose shape and dtype some operations query."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return self._model.get_parameter(name)
        # classes that load stacks in either orientation are published in the opposite one; an empty shape makes
        # transformers, which compares shapes, transpose them
        return tensor.new_empty(0) if tensor.dim() == 3 else tensor


def _facts(conversion: WeightTransform) -> tuple:
    return type(conversion), tuple(conversion.source_patterns), tuple(conversion.target_patterns)
