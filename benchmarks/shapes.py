"""Shapes of experts layers, their transformers classes, and random instances and inputs.

Letters: T tokens, E experts, K chosen experts per token, H hidden size, I intermediate size.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import torch
import transformers
from torch import nn

DTYPE = torch.bfloat16
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """One experts layer.

    Args:
        model: directory in `transformers.models` with the class.
        prefix: prefix of the names of the experts class and its config class.
        num_experts: E.
        hidden: H.
        intermediate: I.
        top_k: K.
        experts_key: name of E in the config.
        intermediate_key: name of I in the config.
    """

    model: str
    prefix: str
    num_experts: int
    hidden: int
    intermediate: int
    top_k: int
    experts_key: str = "num_experts"
    intermediate_key: str = "moe_intermediate_size"

    @property
    def class_name(self) -> str:
        return f"{self.prefix}Experts"

    def __str__(self) -> str:
        return f"{self.class_name}, E {self.num_experts}, H {self.hidden}, I {self.intermediate}, K {self.top_k}"

    def config(self) -> transformers.PreTrainedConfig:
        """The model's config with this layer's sizes."""
        sizes = {
            "hidden_size": self.hidden,
            self.experts_key: self.num_experts,
            self.intermediate_key: self.intermediate,
            "num_experts_per_tok": self.top_k,
        }
        config = getattr(transformers, f"{self.prefix}Config")(**sizes)
        config._experts_implementation = "grouped_mm"
        return config

    def experts_on_meta(self) -> nn.Module:
        """The experts module of transformers on the meta device."""
        modeling = importlib.import_module(f"transformers.models.{self.model}.modeling_{self.model}")
        with torch.device("meta"):
            return getattr(modeling, self.class_name)(self.config())

    @torch.no_grad()
    def experts(self, device: torch.device, seed: int) -> nn.Module:
        """The experts module with frozen random bf16 weights, which depend only on the seed."""
        experts = self.experts_on_meta()
        generator = torch.Generator(device).manual_seed(seed)
        for name, parameter in list(experts.named_parameters()):
            weights = torch.empty(parameter.shape, dtype=DTYPE, device=device)
            for of_expert in weights:
                of_expert.normal_(std=WEIGHT_STD, generator=generator)
            setattr(experts, name, nn.Parameter(weights, requires_grad=False))
        return experts


_TINY = Shape("qwen3_moe", "Qwen3Moe", 8, 64, 32, 2)
_GPT_OSS = Shape("gpt_oss", "GptOss", 32, 2880, 2880, 4, "num_local_experts", "intermediate_size")

SHAPES = {
    "qwen3-30b-a3b": Shape("qwen3_moe", "Qwen3Moe", 128, 2048, 768, 8),
    "mixtral-8x7b": Shape("mixtral", "Mixtral", 8, 4096, 14336, 2, "num_local_experts", "intermediate_size"),
    # (E, in, out) stacks, gate and up interleaved, biases, clamped
    "gpt-oss-20b": _GPT_OSS,
    "deepseek-v3": Shape("deepseek_v3", "DeepseekV3", 256, 7168, 2048, 8, "n_routed_experts"),
    "qwen3-next": Shape("qwen3_next", "Qwen3Next", 512, 2048, 512, 10),
    "tiny": _TINY,
    "tiny-gpt-oss": replace(_GPT_OSS, num_experts=8, hidden=64, intermediate=32, top_k=2),
}
"""Name -> layer; tiny layers are for trying the benchmark on a CPU."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a layer and the gradient of its output.

    Args:
        hidden_states: `(T, H)` bf16, requires a gradient.
        top_k_index: `(T, K)` int64.
        top_k_weights: `(T, K)` bf16, requires a gradient.
        cotangent: `(T, H)` bf16.
    """

    hidden_states: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    cotangent: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden_states, self.top_k_index, self.top_k_weights

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        return {"hidden_states": self.hidden_states, "top_k_weights": self.top_k_weights}


def random_inputs(shape: Shape, num_tokens: int, skew: float, device: torch.device, seed: int) -> Inputs:
    """Inputs of variance 1, routed by the normalized top k of a softmax of random logits.

    Args:
        shape: shape of the layer.
        num_tokens: number of tokens, T.
        skew: `-skew * log(rank)` of the expert, in a random ranking, is added to the logits: 0 routes evenly up to
            chance, 1 gives probabilities as in Zipf's law.
        device: device of the inputs.
        seed: seed of the inputs.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    ranks = 1 + torch.randperm(shape.num_experts, generator=generator, device=device)
    logits = normal(num_tokens, shape.num_experts) - skew * ranks.log()
    weights, index = logits.softmax(-1).topk(shape.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    return Inputs(
        normal(num_tokens, shape.hidden).to(DTYPE).requires_grad_(),
        index,
        weights.to(DTYPE).requires_grad_(),
        normal(num_tokens, shape.hidden).to(DTYPE),
    )
