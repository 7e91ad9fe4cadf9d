"""Llama 4 (transformers 5.17 to 5.24).

The block calls its experts with `(E * T, H)`: one copy of all tokens per expert, multiplied by the routing weights,
which are zero for experts that are not chosen.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from .base import Architecture


def _apply_gate(experts: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return up * experts.act_fn(gate)


def _route(hidden_states: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Skips rows of zeros: gate and up are both zero, so output and gradient are zero too."""
    num_rows = hidden_states.shape[0]
    experts = torch.arange(num_experts, device=hidden_states.device).repeat_interleave(num_rows // num_experts)
    is_chosen = (hidden_states != 0).any(dim=-1)
    weights = torch.ones(num_rows, 1, dtype=hidden_states.dtype, device=hidden_states.device)
    return torch.where(is_chosen, experts, num_experts)[:, None], weights


def _conversions() -> list[WeightConverter]:
    # names in checkpoints of quantizers that split the stacks into linear layers; transformers has no mapping for them
    experts = "feed_forward.experts"
    return [
        WeightConverter(
            [f"{experts}.*.gate_proj.weight", f"{experts}.*.up_proj.weight"],
            f"{experts}.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)],
        ),
        WeightConverter(
            f"{experts}.*.down_proj.weight", f"{experts}.down_proj", [MergeModulelist(dim=0), Transpose(1, 2)]
        ),
    ]


LLAMA4 = Architecture(
    class_name="Llama4TextExperts",
    declarations={"is_transposed": True, "is_concatenated": True, "has_bias": False, "has_gate": True},
    apply_gate=_apply_gate,
    route=_route,
    conversions=_conversions,
)
