"""Whether a merged model gives what the adapter gave before the merge.

The errors of single stacks can't tell: a layer of another kind may have been merged wrongly, or a delta be lost in
rounding. So the model runs on a few tokens three times: without the adapter, with it, and merged.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import ModelOutput

from .calibration import run_without_head

NUM_TOKENS = 512
"""Run at most: enough for a mean over positions, and few beside the calibration's tokens."""

LARGEST_SHARE = 0.5
"""The largest error of a sound merge, as a share of the adapter's effect.

Where the adapter has a clear effect, sound merges into 4 bits measured 0.05 to 0.45; wrong linear layers made it 0.9.
"""

SMALLEST_ERROR = 0.1
"""No warning up to this error: rounding to 4 bits alone can cause it, even if the adapter itself changes less."""


@dataclass(frozen=True)
class MergeCheck:
    """Comparison of a merged model with the live adapter, by their last hidden states.

    Hidden states after the last norm are compared rather than logits, because models for all tasks have them and a
    head with a large vocabulary is expensive. The head itself is not checked.

    Args:
        num_positions: compared; those where the live adapter's states or the base's are not finite are left out.
        num_broken: of these, where the merged model's states are not finite.
        error: L2 distance of the merged model's states from the live adapter's, relative to the norm of these.
        effect: the same distance of the base without adapter.
    """

    num_positions: int
    num_broken: int
    error: float
    effect: float

    @property
    def problem(self) -> str | None:
        """What to warn of; None if the merge looks sound."""
        if self.num_positions == 0:
            return (
                "The merged model couldn't be compared with the live adapter, which gives no finite hidden states for "
                "the tokens tried. Pass a text as calibration, and compare the two on a text."
            )
        if self.num_broken:
            return (
                f"The merged model is broken: its hidden states are not finite at {self.num_broken} of "
                f"{self.num_positions} positions where the live adapter's are."
            )
        if self.error > max(SMALLEST_ERROR, LARGEST_SHARE * self.effect):
            return (
                f"The merged model is far from the live adapter: {self}. Either a layer was merged wrongly, or the "
                "format can't hold so small a delta. Don't use it before you have compared the two on a text; merging "
                "into 16 bits (dtype=torch.bfloat16, or without --quantize) keeps the delta."
            )
        return None

    def __str__(self) -> str:
        return (
            f"hidden states differ from the live adapter's by {self.error:.1%} (without adapter: {self.effect:.1%}), "
            f"at {self.num_positions} positions"
        )


@dataclass(frozen=True)
class Reference:
    """What the live model gives, to hold the merged one against.

    Args:
        token_ids: `(N, L)`.
        unmerged: `(N * L, H)` fp32 on the CPU, with the adapters.
        base: without.
    """

    token_ids: torch.Tensor
    unmerged: torch.Tensor
    base: torch.Tensor

    def check(self, merged: nn.Module) -> MergeCheck:
        """Runs the merged model, and warns if it is far from the live one."""
        found = _last_states(merged, self.token_ids)
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
    """Relative to the norm of the unmerged model's states."""
    unmerged = unmerged.double()
    return ((states - unmerged).norm() / unmerged.norm().clamp_min(torch.finfo(unmerged.dtype).tiny)).item()


def take_reference(tuner: BaseTuner, adapter_names: Sequence[str], token_ids: torch.Tensor) -> Reference:
    """Runs the live model without adapters and with those given, which are active and frozen afterwards.

    Args:
        tuner: nothing is merged into its layers.
        adapter_names: what is going to be merged.
        token_ids: `(N, L)`, of which at most 512 are taken.
    """
    model = tuner.model
    token_ids = token_ids[: max(1, NUM_TOKENS // token_ids.shape[1]), :NUM_TOKENS]
    for layer in model.modules():
        if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            layer.enable_adapters(False)
    base = _last_states(model, token_ids)
    tuner.enable_adapter_layers()
    tuner.set_adapter(list(adapter_names), inference_mode=True)
    return Reference(token_ids, _last_states(model, token_ids), base)


def _last_states(model: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """`(positions, H)` fp32 on the CPU; of a model of another kind, which gives something else, none."""
    output = run_without_head(model, token_ids)
    if isinstance(output, (tuple, list, ModelOutput)):
        output = output[0]
    if not isinstance(output, torch.Tensor):
        return torch.empty(0, 1)
    output = torch.atleast_1d(output)
    return output.reshape(-1, output.shape[-1]).float().cpu()
