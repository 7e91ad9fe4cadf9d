"""Description of an experts class that does not declare its layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.core_model_loading import WeightTransform


@dataclass(frozen=True)
class Architecture:
    """An experts class without `@use_experts_implementation`.

    Args:
        class_name: name of the class.
        declarations: attributes that the decorator would set on the instance: `is_transposed`, `is_concatenated`,
            `has_bias`, `has_gate`.
        apply_gate: `act_fn(gate) * up`, as a function of the experts module and `(R, 2 * I)` rows -> `(R, I)`.
        route: function `(hidden states, E)` -> `(R, 1)` expert ids, E for rows that are not computed, and `(R, 1)`
            weights. None: the class is called with ids and weights, like classes with the decorator.
        conversions: conversions of checkpoints with one tensor per expert, if transformers has none.
    """

    class_name: str
    declarations: Mapping[str, bool]
    apply_gate: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    route: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]] | None = None
    conversions: Callable[[], list[WeightTransform]] = list
