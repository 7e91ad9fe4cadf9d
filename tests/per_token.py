"""The computation of experts, written down independently: token by token, choice by choice, in plain fp32 torch.

It calls neither the package nor the experts classes. Each class has its formula here under its name. A class that is
not named in `GATES`, such as a new class of a later transformers, is compared with its own forward (`own_output`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import gelu, relu, silu

TRANSPOSED = frozenset({"AriaExperts", "GptOssExperts", "OpenAIPrivacyFilterExperts"})
"""Classes that store a matrix as `(in, out)`."""

UNGATED = frozenset({"NemotronHExperts"})
"""Classes whose first projection is `up_proj`."""

BIASED = frozenset({"GptOssExperts", "OpenAIPrivacyFilterExperts"})

NORMED = frozenset({"MuseSparkExperts"})
"""Classes with a norm after the down projection."""

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
    # gpt-oss's constants, which early versions of transformers have in the class instead of the config
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


# fmt: off
_PLAIN = [
    "AXK1Experts", "AXK2Experts", "AfmoeExperts", "AriaExperts", "BailingHybridExperts", "BeamExperts",
    "Cohere2MoeExperts", "DeepseekOcr2TextExperts", "DeepseekV2Experts", "DeepseekV32Experts", "DeepseekV3Experts",
    "Dots1Experts", "Dots3NoteExperts", "Ernie4_5_MoeExperts", "Ernie4_5_VLMoeMoeExperts", "ExaoneMoeExperts",
    "FlexOlmoExperts", "FlintExperts", "Glm4MoeExperts", "Glm4MoeLiteExperts", "Glm4vMoeTextExperts",
    "GlmMoeDsaExperts", "GraniteMoeExperts", "GraniteMoeHybridExperts", "GraniteMoeSWAExperts",
    "GraniteMoeSharedExperts", "HYV3Experts", "HunYuanMoEV1Experts", "InklingExperts", "JambaExperts",
    "KimiLinearExperts", "Kolibri1Experts", "LagunaExperts", "LaraMiniExperts", "Lfm2MoeExperts", "MellumExperts",
    "MiMoV2FlashExperts", "MiniMaxExperts", "MiniMaxM2Experts", "Mistral4Experts", "MistralLarge4TextExperts",
    "MixtralExperts", "MuseSparkExperts", "OlmoeExperts", "PhimoeExperts", "Qwen2MoeExperts", "Qwen3MoeExperts",
    "Qwen3NextExperts", "Qwen3OmniMoeTalkerTextExperts", "Qwen3OmniMoeThinkerTextExperts", "Qwen3VLMoeTextExperts",
    "Qwen3_5MoeExperts", "Qwen4ExpTextExperts", "SolarOpenExperts", "UnlimitedOcrTextExperts", "ZayaExperts",
]
# fmt: on

GATES: dict[str, Gate] = {
    **dict.fromkeys(_PLAIN, _silu_gate),
    "DeepseekV4Experts": _clamped_silu_gate,
    "DiffusionGemmaTextExperts": _gelu_gate,
    "Gemma4TextExperts": _gelu_gate,
    "Glm5NextTextExperts": _clamped_silu_gate,
    "GptOssExperts": _interleaved_swiglu_oai,
    "HYV4Experts": _clamped_silu_gate,
    "HYV4VLExperts": _clamped_silu_gate,
    "Inkling2Experts": _softcapped_gate,
    "Inkling2LoopExperts": _softcapped_gate,
    "MiniMaxM3VLExperts": _concatenated_swiglu_oai,
    "NemotronHExperts": _squared_relu,
    "OpenAIPrivacyFilterExperts": _concatenated_swiglu_oai,
}
"""The gate formula of every known class."""

LIMITED = frozenset(name for name, gate in GATES.items() if gate not in (_silu_gate, _gelu_gate, _squared_relu))
"""Classes that clamp or softcap the output of the first projection."""


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


def with_lora(
    stack: torch.Tensor, is_transposed: bool, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """A dense stack, as the class stores it, plus `scaling * B[e] @ A[e]` of each expert."""
    deltas = [scaling * (B[expert] @ A[expert]) for expert in range(stack.shape[0])]
    return stack + torch.stack([delta.T if is_transposed else delta for delta in deltas])


def experts_output(
    class_name: str,
    config: Any,
    parameters: Mapping[str, torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts' part of a MoE layer: `(T, H)` -> `(T, H)`.

    Args:
        class_name: the experts class.
        config: has limits and epsilons under the model's own names.
        parameters: fp32, under the class's own names.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)`; an id outside the local experts contributes nothing.
        top_k_weights: `(T, K)`.
    """
    activate = GATES[class_name]

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


def own_output(
    experts: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """`experts_output` by the class's own forward, with the given parameters."""
    # classes differ in how they handle an id outside the local experts
    is_here = (top_k_index >= 0) & (top_k_index < experts.down_proj.shape[0])
    arguments = (hidden_states, top_k_index.where(is_here, 0), top_k_weights * is_here)
    return functional_call(experts, dict(parameters), arguments) + 0 * hidden_states
