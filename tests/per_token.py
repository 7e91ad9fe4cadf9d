"""What experts compute, written down a third time: token by token, choice by choice, in plain fp32 torch.

Neither the package nor the experts classes are called; each class has its formula here under its name. Classes that
are not named have the common one: `silu(gate) * up` of concatenated `(out, in)` stacks, no bias, no norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import gelu, relu, silu

TRANSPOSED = frozenset({"AriaExperts", "GptOssExperts", "OpenAIPrivacyFilterExperts"})
"""Classes that store a matrix as `(in, out)`."""

UNGATED = frozenset({"NemotronHExperts"})
"""Classes whose first projection is `up_proj`."""

BIASED = frozenset({"GptOssExperts", "OpenAIPrivacyFilterExperts"})

NORMED = frozenset({"MuseSparkExperts"})
"""Classes with a norm behind the down projection."""

Gate = Callable[[torch.Tensor, Any], torch.Tensor]


def _halves(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = row.shape[-1] // 2
    return row[..., :width], row[..., width:]


def _silu_gate(row: torch.Tensor, config: Any) -> torch.Tensor:
    gate, up = _halves(row)
    return silu(gate) * up


def _gelu_gate(row: torch.Tensor, config: Any) -> torch.Tensor:
    gate, up = _halves(row)
    return gelu(gate, approximate="tanh") * up


def _clamped_silu_gate(row: torch.Tensor, config: Any) -> torch.Tensor:
    gate, up = _halves(row)
    limit = config.swiglu_limit
    return silu(torch.clamp(gate, max=limit)) * torch.clamp(up, -limit, limit)


def _swiglu_oai(gate: torch.Tensor, up: torch.Tensor, config: Any) -> torch.Tensor:
    # the numbers of gpt-oss, which early versions of transformers have in the class instead of the config
    alpha, limit = getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)
    gate = torch.clamp(gate, max=limit)
    return (torch.clamp(up, -limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)


def _concatenated_swiglu_oai(row: torch.Tensor, config: Any) -> torch.Tensor:
    return _swiglu_oai(*_halves(row), config)


def _interleaved_swiglu_oai(row: torch.Tensor, config: Any) -> torch.Tensor:
    gate, up = row.unflatten(-1, (-1, 2)).unbind(-1)
    return _swiglu_oai(gate, up, config)


def _softcapped_gate(row: torch.Tensor, config: Any) -> torch.Tensor:
    def cap(x: torch.Tensor, at: float) -> torch.Tensor:
        return at * torch.tanh(x / at)

    gate, up = _halves(row)
    return cap(gate, config.mlp_gate_softcap) * torch.sigmoid(gate) * cap(up, config.mlp_up_softcap)


def _squared_relu(row: torch.Tensor, config: Any) -> torch.Tensor:
    return relu(row).square()


GATES: dict[str, Gate] = {
    "DeepseekV4Experts": _clamped_silu_gate,
    "DiffusionGemmaTextExperts": _gelu_gate,
    "Gemma4TextExperts": _gelu_gate,
    "Glm5NextTextExperts": _clamped_silu_gate,
    "GptOssExperts": _interleaved_swiglu_oai,
    "HYV4Experts": _clamped_silu_gate,
    "Inkling2Experts": _softcapped_gate,
    "MiniMaxM3VLExperts": _concatenated_swiglu_oai,
    "NemotronHExperts": _squared_relu,
    "OpenAIPrivacyFilterExperts": _concatenated_swiglu_oai,
}

LIMITED = frozenset(name for name, gate in GATES.items() if gate not in (_gelu_gate, _squared_relu))
"""Classes that clamp or cap what comes out of the first projection."""


def _scaled_rms_norm(row: torch.Tensor, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """muse_spark's: scaled by `1 + weight` first, then normalized."""
    scaled = (1 + weight) * row
    return scaled / torch.sqrt(scaled.square().mean() + config.post_norm_eps)


def up_name(class_name: str) -> str:
    return "up_proj" if class_name in UNGATED else "gate_up_proj"


def stored_shape(class_name: str, num_experts: int, in_features: int, out_features: int) -> tuple[int, int, int]:
    if class_name in TRANSPOSED:
        return num_experts, in_features, out_features
    return num_experts, out_features, in_features


def with_lora(class_name: str, stack: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """A dense stack, as the class stores it, plus `scaling * B[e] @ A[e]` of each expert."""
    deltas = [scaling * (B[expert] @ A[expert]) for expert in range(stack.shape[0])]
    if class_name in TRANSPOSED:
        deltas = [delta.T for delta in deltas]
    return stack + torch.stack(deltas)


def experts_output(
    class_name: str,
    config: Any,
    parameters: Mapping[str, torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts' share of a MoE layer: `(T, H)` -> `(T, H)`.

    Args:
        class_name: whose formula it is.
        config: gives limits and epsilons under the model's own names.
        parameters: fp32, under the class's own names.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)`; an id that is no expert here contributes nothing.
        top_k_weights: `(T, K)`.
    """
    activate = GATES.get(class_name, _silu_gate)

    def linear(row: torch.Tensor, projection: str, expert: int) -> torch.Tensor:
        matrix = matrices[projection][expert]
        row = row @ matrix if class_name in TRANSPOSED else matrix @ row
        return row + parameters[f"{projection}_bias"][expert] if class_name in BIASED else row

    up, down = up_name(class_name), "down_proj"
    matrices = {projection: parameters[projection].unbind() for projection in (up, down)}
    num_experts = len(matrices[up])
    tokens = []
    for token, experts in enumerate(top_k_index.tolist()):
        total = 0 * hidden_states[token]
        for choice, expert in enumerate(experts):
            if not 0 <= expert < num_experts:
                continue
            row = linear(hidden_states[token], up, expert)
            row = linear(activate(row, config), down, expert)
            if class_name in NORMED:
                row = _scaled_rms_norm(row, parameters["post_expert_norm.weight"], config)
            total = total + top_k_weights[token, choice] * row
        tokens.append(total)
    return torch.stack(tokens) if tokens else 0 * hidden_states
