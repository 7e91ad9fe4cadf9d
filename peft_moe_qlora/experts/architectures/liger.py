"""Liger's experts (liger-kernel 0.8).

`apply_liger_kernel_to_qwen3_moe()`, similar functions, and Trainer with `use_liger_kernel=True` replace the experts
class of transformers for the rest of the process: Mixtral, Qwen3-MoE, Qwen3-VL-MoE, Qwen3-Next, Qwen3.5-MoE, GLM-4.5V,
HunYuan-MoE, DeepSeek V2 and V3. All have the same layout, and Liger rejects gates other than SiLU.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .base import Architecture


def _apply_gate(experts: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


LIGER = Architecture(
    class_name="LigerExperts",
    declarations={"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True},
    apply_gate=_apply_gate,
)
