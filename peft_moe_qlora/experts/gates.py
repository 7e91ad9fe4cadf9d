"""Which of the gates that the kernels know is an experts class's own."""

from __future__ import annotations

from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from ..ops import Gate
from .architectures import architecture_of
from .layout import ExpertsLayout

_ACTIVATIONS = {SiLUActivation: "silu", nn.SiLU: "silu", GELUTanh: "gelu_tanh"}

_CLAMPED_GATES = {
    "DeepseekV4Experts": ("clamped_silu", False, "limit", None),
    "Glm5NextTextExperts": ("clamped_silu", False, "swiglu_limit", None),
    "GptOssExperts": ("swiglu_oai", True, "limit", "alpha"),
    "HYV4Experts": ("clamped_silu", False, "swiglu_limit", None),
    "MiniMaxM3VLExperts": ("swiglu_oai", False, "swiglu_limit", "swiglu_alpha"),
    "OpenAIPrivacyFilterExperts": ("swiglu_oai", False, "limit", "alpha"),
}
"""Classes with an `_apply_gate` of their own: kind, interleaved, and the attributes that hold the two numbers."""


def known_gate(module: nn.Module, layout: ExpertsLayout) -> Gate | str:
    """The gate of an experts module if the kernels know it, otherwise why not.

    Args:
        module: of the class itself, with or without its stacks.
        layout: what it declares.
    """
    if not layout.has_gate:
        return f"{layout.class_name} has no gate"
    if not type(module).__module__.startswith("transformers.models.") or "_apply_gate" in vars(module):
        return f"the gate of this {layout.class_name} is not that of transformers"
    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)))
    if layout.class_name in _CLAMPED_GATES:
        kind, interleaved, limit, alpha = _CLAMPED_GATES[layout.class_name]
        if kind == "clamped_silu" and hasattr(module, "act_fn") and activation != "silu":
            return f"the activation {type(module.act_fn).__name__} is not one of the kernels'"
        return Gate(kind, interleaved, float(getattr(module, limit)), float(getattr(module, alpha)) if alpha else 0.0)
    # what transformers gives to classes without one of their own (integrations/moe.py)
    if architecture_of(module) is None and type(module)._apply_gate.__name__ != "_default_apply_gate":
        return f"{layout.class_name} has a gate of its own"
    if activation is None:
        return f"the activation {type(module.act_fn).__name__} is not one of the kernels'"
    return Gate(activation)
