"""Compares a merged model with the unmerged adapter.

The errors of single stacks do not show whether another layer was merged incorrectly or a delta was lost in rounding.
Therefore the model runs on a few tokens three times: without the adapter, with it, and merged.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import ModelOutput

from ..experts import QuantizedExperts
from ..progress import PATIENCE
from .calibration import run_without_head

NUM_TOKENS = 512
"""Maximum number of tokens: enough for a mean over positions, and few compared to the calibration tokens."""

LARGEST_SHARE = 0.5
"""The largest error of a correct merge, as a fraction of the adapter's effect.

For adapters with a clear effect, correct merges into 4 bits measured 0.05 to 0.45; wrong linear layers measured 0.9.
"""

SMALLEST_ERROR = 0.1
"""Smaller errors cause no warning: rounding to 4 bits alone can exceed the effect of a small adapter."""


@dataclass(frozen=True)
class MergeCheck:
    """Comparison of a merged model with the unmerged adapter, by their last hidden states.

    Hidden states after the last norm are compared rather than logits, because models for all tasks have them and a
    head with a large vocabulary is expensive. The head itself is not checked.

    Args:
        num_positions: positions where the hidden states of the unmerged adapter and of the base are finite.
        num_broken: number of these positions where the merged model's states are not finite.
        error: L2 distance of the merged model's states from the unmerged adapter's, relative to the norm of the
            latter.
        effect: the same distance for the base without adapter.
    """

    num_positions: int
    num_broken: int
    error: float
    effect: float

    @property
    def problem(self) -> str | None:
        """Text of the warning; None if the merge looks correct."""
        if self.num_positions == 0:
            return (
                "The merged model could not be compared with the unmerged adapter, whose hidden states are not finite "
                "for any of the tokens tried. Pass a text as calibration, and compare the two models on a text."
            )
        if self.num_broken:
            return (
                f"The merged model is broken: its hidden states are not finite at {self.num_broken} of "
                f"{self.num_positions} positions where those of the unmerged adapter are finite. Merge into 16 bits "
                "(dtype=torch.bfloat16, or without --quantize)."
            )
        if self.error > max(SMALLEST_ERROR, LARGEST_SHARE * self.effect):
            return (
                f"The merged model differs too much from the unmerged adapter: {self}. A layer was merged "
                "incorrectly, or the delta is too small for the format. Compare the two models on a text before you "
                "use the merged one, or merge into 16 bits (dtype=torch.bfloat16, or without --quantize), which keeps "
                "the delta."
            )
        return None

    def __str__(self) -> str:
        return (
            f"hidden states differ from those of the unmerged adapter by {self.error:.1%} (base without adapter: "
            f"{self.effect:.1%}), at {self.num_positions} positions"
        )


@dataclass(frozen=True)
class Reference:
    """Hidden states of the unmerged model, the reference for the merged one.

    Args:
        token_ids: `(N, L)`.
        unmerged: `(N * L, H)` fp32 on the CPU, with the adapters.
        base: likewise, without the adapters.
    """

    token_ids: torch.Tensor
    unmerged: torch.Tensor
    base: torch.Tensor

    def check(self, merged: nn.Module, progressbar: bool = True) -> MergeCheck:
        """Runs the merged model, and warns if it differs too much from the unmerged one."""
        found = _last_states(merged, self.token_ids, "Running the merged model" if progressbar else None)
        is_given = self.unmerged.isfinite().all(dim=1) & self.base.isfinite().all(dim=1)
        is_compared = is_given & found.isfinite().all(dim=1)
        result = MergeCheck(
            num_positions=int(is_given.sum()),
            num_broken=int((is_given & ~is_compared).sum()),
            error=_distance(found[is_compared], self.unmerged[is_compared]),
            effect=_distance(self.base[is_compared], self.unmerged[is_compared]),
        )
        if result.problem is not None:
            warnings.warn(result.problem, RuntimeWarning, stacklevel=3)
        return result


def _distance(states: torch.Tensor, unmerged: torch.Tensor) -> float:
    """L2 distance relative to the norm of the unmerged model's states."""
    unmerged = unmerged.double()
    return ((states - unmerged).norm() / unmerged.norm().clamp_min(torch.finfo(unmerged.dtype).tiny)).item()


def take_reference(
    tuner: BaseTuner, adapter_names: Sequence[str], token_ids: torch.Tensor, progressbar: bool = True
) -> Reference:
    """Runs the unmerged model without adapters and with the given ones, which are active and frozen afterwards.

    Args:
        tuner: the tuner, with all layers unmerged.
        adapter_names: the adapters that will be merged.
        token_ids: `(N, L)`, of which at most 512 are used.
        progressbar: whether to show a progress bar if a run takes several seconds.
    """
    model = tuner.model
    token_ids = token_ids[: max(1, NUM_TOKENS // token_ids.shape[1]), :NUM_TOKENS]
    for layer in model.modules():
        if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            layer.enable_adapters(False)
    base = _last_states(model, token_ids, "Running the base" if progressbar else None)
    tuner.enable_adapter_layers()
    tuner.set_adapter(list(adapter_names), inference_mode=True)
    unmerged = _last_states(model, token_ids, "Running the adapted model" if progressbar else None)
    return Reference(token_ids, unmerged, base)


def _last_states(model: nn.Module, token_ids: torch.Tensor, desc: str | None) -> torch.Tensor:
    """`(positions, H)` fp32 on the CPU; empty if the model's output is not a tensor of hidden states."""
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    with tqdm(total=len(experts), desc=desc, unit="layer", delay=PATIENCE, disable=desc is None) as bar:

        def count(*_: Any) -> None:  # a value would replace the module's output, and `update` returns one
            bar.update()

        handles = [module.register_forward_hook(count) for module in experts]
        try:
            output = run_without_head(model, token_ids)
        finally:
            for handle in handles:
                handle.remove()
    if isinstance(output, (tuple, list, ModelOutput)):
        output = output[0]
    if not isinstance(output, torch.Tensor):
        return torch.empty(0, 1)
    output = torch.atleast_1d(output)
    return output.reshape(-1, output.shape[-1]).float().cpu()
