"""Names and layout of a model's weights in its original checkpoint, for one or a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightTransform, revert_weight_conversion


class CheckpointNames:
    """transformers' reverse mapping from a model to its checkpoint, computed once for many tensors.

    Args:
        model: whose parameters are named; adapters and quantization may have replaced its modules.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        loaded = [_facts(one) for one in model.__dict__.get("_weight_conversions") or ()]
        # restores a prefix that loading has removed: a text model from a checkpoint that has towers, too
        self._conversions = [
            one
            for one in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(one, PrefixChange) or _facts(one) in loaded
        ]
        reversed_ones = [one.reverse_transform() for one in self._conversions[::-1]]
        self._converters = [one for one in reversed_ones if isinstance(one, WeightConverter)]

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Groups names that are converted to tensors of the checkpoint only together."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._first_key(name) or name, []).append(name)
        return list(found.values())

    def is_plain(self, name: str) -> bool:
        """Whether a tensor differs at most by its name in the checkpoint."""
        return self._first_key(name) is None

    def _first_key(self, name: str) -> str | None:
        for converter in self._converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return renamed
        return None

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One group under the names and in the order that it has in the checkpoint.

        Raises:
            ValueError: transformers can't convert them for the model in its present state.
        """
        try:
            return revert_weight_conversion(_Stand(self._conversions, self.model, tensors), dict(tensors))
        except (AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{', '.join(tensors)} can't be brought into the layout of a checkpoint one by one: {error}. "
                "Merge the adapter into a directory (peft-moe-qlora merge), and load that."
            ) from error

    def keys(self, names: Iterable[str]) -> dict[str, str]:
        """Name -> key of plain tensors; pass all at once, since some renamings depend on several of them."""
        in_order = list(names)
        found = self.convert({name: torch.tensor([number]) for number, name in enumerate(in_order)})
        return {in_order[number.item()]: key for key, number in found.items()}

    def of_parts(self, name: str, num_experts: int, num_parts: int) -> list[str] | None:
        """The keys of all parts of a stack, expert by expert, gate before up; None if some have no key.

        Args:
            name: of the stack.
            num_experts: in it.
            num_parts: matrices of equal size, stacked along the rows, that make up one of an expert.
        """
        # numbers replace the weights, 2 x 2 for each part, so that the operations' results show the mapping
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
        # stacks that are loaded in either orientation are published in the opposite one to their class;
        # transformers compares shapes, and would leave them as they are
        return tensor.new_empty(0) if tensor.dim() == 3 else tensor


def _facts(conversion: WeightTransform) -> tuple:
    return type(conversion), tuple(conversion.source_patterns), tuple(conversion.target_patterns)
