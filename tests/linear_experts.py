"""The reference for experts: the same model with each expert's projections as `nn.Linear`, adapted by PEFT's LoRA."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn

from peft_moe_qlora import MoeQLoraConfig

NUM_EXPERTS = 8
_STACK = re.compile(r"\.experts\.(gate_up_proj|down_proj)\b")


class LinearExpert(nn.Module):
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj = _linear(gate_up)
        self.down_proj = _linear(down)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(rows).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


class LinearExperts(nn.ModuleList):
    """Replaces `Qwen3MoeExperts`."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__(LinearExpert(*stacks) for stacks in zip(experts.gate_up_proj, experts.down_proj))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            # each expert sees all tokens, so hooks and gradients don't depend on the routing
            weights = torch.where(top_k_index == number, top_k_weights, 0).sum(-1, keepdim=True)
            total = total + weights * expert(hidden_states)
        return total


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear


class Ours:
    """The model with stacks of experts, adapted by this package."""

    config_class = MoeQLoraConfig
    targets: ClassVar = ["q_proj", "experts"]
    options: ClassVar = {"quant_type": None}

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return tiny_model(dtype=dtype)

    def config(self, **options) -> LoraConfig:
        defaults = {"r": 4, "lora_alpha": 6, "target_modules": self.targets, **self.options}
        return self.config_class(**{**defaults, **options})

    def adapted(self, *configs: LoraConfig, dtype: torch.dtype = torch.float32) -> PeftModel:
        """With the adapters `default`, `second` and `third`, the first one active, with random factors."""
        first, *others = configs or [self.config()]
        model = get_peft_model(self.base(dtype), first)
        for name, config in zip(("second", "third"), others):
            model.add_adapter(name, config)
        set_factors(model)
        return model.eval()


class Stock(Ours):
    """The model with linear layers as experts, adapted by PEFT's LoRA."""

    config_class = LoraConfig
    targets: ClassVar = ["q_proj", "gate_up_proj", "down_proj"]
    options: ClassVar = {}

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = super().base(dtype)
        for layer in model.model.layers:
            layer.mlp.experts = LinearExperts(layer.mlp.experts)
        model.config.model_type = "linear_experts"  # for qwen3_moe, PEFT maps these target names to stacks
        return model


def per_expert(named: Iterable[tuple[str, torch.Tensor | bool]]) -> dict[str, torch.Tensor | bool]:
    """Splits stacks of experts into matrices, under the names of the linear layers."""
    matrices = {}
    for name, value in named:
        if not _STACK.search(name):
            matrices[name] = value
            continue
        for number in range(NUM_EXPERTS):
            of_expert = _STACK.sub(rf".experts.{number}.\1", name)
            matrices[of_expert] = value[number] if isinstance(value, torch.Tensor) and value.dim() == 3 else value
    return matrices


@torch.no_grad()
def set_factors(model: nn.Module, std: float = 0.2) -> None:
    """Random factors, the same for a stack and for its single experts."""
    for name, matrix in per_expert(model.named_parameters()).items():
        if ".lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * std)


def backward(model: nn.Module) -> None:
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
