"""The gates that kernels compute by formula equal those of the classes, independently of class names."""

from __future__ import annotations

import math

import per_token
import pytest
import torch
from experts_classes import ExpertsClass, build, find_experts_classes
from gate_formulas import gated
from test_architectures import llama4
from torch import nn
from torch.nn.functional import gelu, relu, sigmoid, silu
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from peft_moe_qlora.experts import ExpertsLayout, QuantizedExperts, convert_experts, read_layout
from peft_moe_qlora.experts.gates import known_gate
from peft_moe_qlora.ops import Gate

DECORATED = [found for found in find_experts_classes() if found.is_decorated]
BY_NAME = {found.name: found for found in DECORATED}
OF_NO_KERNEL = {"Inkling2Experts", "Inkling2LoopExperts", "NemotronHExperts"}


def gate_of(experts: nn.Module) -> Gate | str:
    return known_gate(experts, read_layout(experts, "experts"))


@pytest.mark.parametrize("experts_class", DECORATED, ids=lambda found: found.name)
def test_known_gates_match_the_classes(experts_class: ExpertsClass):
    experts = build(experts_class)
    gate = gate_of(experts)
    assert isinstance(gate, Gate) or experts_class.name not in per_token.GATES.keys() - OF_NO_KERNEL, gate
    if isinstance(gate, str):
        assert gate, "a reason"
        return
    x = torch.randn(50, 32) * 20  # beyond every clamp
    torch.testing.assert_close(experts._apply_gate(x), gated(x, gate))


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("Qwen3MoeExperts", Gate("silu")),
        ("Gemma4TextExperts", Gate("gelu_tanh")),
        ("GptOssExperts", Gate("swiglu_oai", True, 7.0, 1.702)),
        ("OpenAIPrivacyFilterExperts", Gate("swiglu_oai", False, 7.0, 1.702)),
        ("DeepseekV4Experts", Gate("clamped_silu", False, 10.0)),
    ],
)
def test_constants_of_known_gates(name, gate):
    experts = build(BY_NAME[name])
    assert gate_of(experts) == gate
    assert experts.training


@pytest.mark.skipif("HYV4VLExperts" not in BY_NAME, reason="this version of transformers doesn't have it")
def test_class_without_an_entry_by_name():
    assert gate_of(build(BY_NAME["HYV4VLExperts"])) == Gate("clamped_silu", False, 10.0)


def test_class_without_a_declaration(device):
    model = llama4(device)
    convert_experts(model, None)
    found = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert [experts._gate for experts in found] == [Gate("silu")] * 2


def test_changed_gate_under_the_same_name(monkeypatch):
    experts = build(BY_NAME["GptOssExperts"])
    own = GptOssExperts._apply_gate
    monkeypatch.setattr(GptOssExperts, "_apply_gate", lambda self, x: own(self, x) + 1e-3 * x[..., ::2].clamp(-1, 1))
    assert "the kernels do not implement the gate" in gate_of(experts)


def test_gate_is_found_on_any_device(device):
    for place in ("meta", device):
        assert gate_of(build(BY_NAME["GptOssExperts"]).to(place)) == Gate("swiglu_oai", True, 7.0, 1.702)
    experts = build(BY_NAME["DeepseekV4Experts"])
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.inference_mode():
            assert gate_of(experts) == Gate("clamped_silu", False, 10.0)
    finally:
        torch.set_default_dtype(default)


class Own(nn.Module):
    """A user-defined experts class."""

    limit, alpha = 7.0, 1.702

    def __init__(self, gate, **attributes) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 2 * 5, 6))
        self.down_proj = nn.Parameter(torch.zeros(4, 6, 5))
        self.gate = gate
        for name, value in attributes.items():
            setattr(self, name, value)

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(self, *x.chunk(2, dim=-1))


class Interleaved(Own):
    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(self, x[..., ::2], x[..., 1::2])


def gate_of_own(experts: nn.Module, is_concatenated: bool = True) -> Gate | str:
    return known_gate(experts, ExpertsLayout("Own", 4, 6, 5, False, is_concatenated, False, True, False))


def clamped_silu(g: torch.Tensor, u: torch.Tensor, limit: float) -> torch.Tensor:
    return silu(g.clamp(max=limit)) * u.clamp(-limit, limit)


def swiglu_oai(g: torch.Tensor, u: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return g * sigmoid(alpha * g) * (1 + u)


class Bounded(nn.Module):
    """An activation with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bound = 0.3


def in_place(self: Own, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    g.clamp_(max=self.limit)
    u.clamp_(-self.limit, self.limit)
    return silu(g) * u


@pytest.mark.parametrize(
    ("experts", "gate"),
    [
        (Own(lambda self, g, u: u * g * sigmoid(g)), Gate("silu")),
        (Interleaved(lambda self, g, u: self.act(g) * u, act=nn.SiLU()), Gate("silu", True)),
        (Own(lambda self, g, u: self.act(g) * u, act=ACT2FN["gelu_new"]), Gate("gelu_tanh")),
        (Interleaved(lambda self, g, u: gelu(g, approximate="tanh") * u), Gate("gelu_tanh", True)),
        (Own(lambda self, g, u: clamped_silu(g, u, self.limit)), Gate("clamped_silu", False, 7.0)),
        (Own(lambda self, g, u: clamped_silu(g, u, self.top), top=3), Gate("clamped_silu", False, 3.0)),
        (Own(lambda self, g, u: clamped_silu(g, u, self.act.bound), act=Bounded()), Gate("clamped_silu", False, 0.3)),
        (Interleaved(in_place), Gate("clamped_silu", True, 7.0)),
        (Own(lambda self, g, u: swiglu_oai(g, u, self.limit, self.alpha)), Gate("swiglu_oai", False, 7.0, 1.702)),
        (
            Interleaved(lambda self, g, u: swiglu_oai(g, u, self.a, self.b), a=2 / 3, b=math.sqrt(3)),
            Gate("swiglu_oai", True, 2 / 3, math.sqrt(3)),
        ),
    ],
)
@pytest.mark.parametrize("is_concatenated", [True, False])
def test_user_defined_gates(experts, gate, is_concatenated):
    """They are identified by their values, and so is the order of gate and up."""
    assert gate_of_own(experts, is_concatenated) == gate


class LearnedSwish(nn.Module):
    """Has a learnable slope, and equals SiLU initially."""

    def __init__(self, register) -> None:
        super().__init__()
        register(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * sigmoid(self.beta * x)


def straight_through(g: torch.Tensor, u: torch.Tensor, limit: float) -> torch.Tensor:
    """Values of a clamped gate, with the derivatives of an unclamped one."""
    free = silu(g) * u
    return free + (clamped_silu(g, u, limit) - free).detach()


class Noisy(Own):
    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        g, u = x.chunk(2, dim=-1)
        return silu(g) * u * (1.01 if self.training else 1.0)


NEARLY = {
    "gelu": lambda self, g, u: gelu(g) * u,
    "gelu by a sigmoid": lambda self, g, u: g * sigmoid(1.702 * g) * u,
    "a little off": lambda self, g, u: silu(g) * u * (1 + 1e-5),
    "a little more": lambda self, g, u: silu(g) * u + 1e-4 * sigmoid(g),
    "halves swapped": lambda self, g, u: silu(u) * g,
    "a limit in the code": lambda self, g, u: clamped_silu(g, u, 5.0),
    "a limit far off": lambda self, g, u: silu(g.clamp(max=1e5)) * u,
    "a limit far off, of up": lambda self, g, u: silu(g) * u.clamp(-65504, 65504),
    "a limit of gate alone": lambda self, g, u: silu(g.clamp(max=self.limit)) * u,
    "a limit of up alone": lambda self, g, u: silu(g) * u.clamp(-self.limit, self.limit),
    "a limit of up from above": lambda self, g, u: silu(g.clamp(max=self.limit)) * u.clamp(max=self.limit),
    "a limit on both sides": lambda self, g, u: silu(g.clamp(-self.limit, self.limit)) * u.clamp(-7, 7),
    "a limit behind silu": lambda self, g, u: silu(g).clamp(max=self.limit) * u.clamp(-self.limit, self.limit),
    "two limits": lambda self, g, u: silu(g.clamp(max=self.limit)) * u.clamp(-self.alpha, self.alpha),
    "the next limit": lambda self, g, u: clamped_silu(g, u, math.nextafter(7, 8) + 5e-7),
    "half a derivative at the limit": lambda self, g, u: silu(torch.minimum(g, g.new_tensor(7))) * u.clamp(-7, 7),
    "a soft limit": lambda self, g, u: 7 * torch.tanh(silu(g) / 7) * u,
    "a slope beyond the limit": lambda self, g, u: clamped_silu(g, u, 7.0) + 1e-5 * silu(g) * relu(u - 7),
    "derivatives of another": lambda self, g, u: straight_through(g, u, 7.0),
    "another slope": lambda self, g, u: swiglu_oai(g, u, 7.0, 1.7021),
    "without the one": lambda self, g, u: swiglu_oai(g, u, 7.0, 1.702) - g.clamp(max=7) * sigmoid(1.702 * g),
    "the one within the limit": lambda self, g, u: (1 + u).clamp(-7, 7) * swiglu_oai(g, 0 * u, 7.0, 1.702),
    "normalized": lambda self, g, u: silu(g) * u / (silu(g) * u).norm(dim=-1, keepdim=True),
    "mixed": lambda self, g, u: silu(g) * u.flip(-1),
    "narrower": lambda self, g, u: (silu(g) * u)[..., :-1],
    "rounded": lambda self, g, u: (silu(g) * u).bfloat16(),
}


@pytest.mark.parametrize("kind", [Own, Interleaved])
@pytest.mark.parametrize("gate", NEARLY.values(), ids=NEARLY)
def test_nearly_known_gates(gate, kind):
    assert gate_of_own(kind(gate)) == "the kernels do not implement the gate of Own"


def test_gates_that_can_change():
    """They match a known gate now, but may differ after a step, in training mode, or on another instance."""
    learns = LearnedSwish(lambda self: self.register_parameter("beta", nn.Parameter(torch.ones(()))))
    loads = LearnedSwish(lambda self: self.register_buffer("beta", torch.ones(())))
    for act in (learns, loads, nn.Sequential(nn.SiLU(), learns)):
        assert "may depend on act" in gate_of_own(Own(lambda self, g, u: self.act(g) * u, act=act))
    drops = nn.Sequential(nn.SiLU(), nn.Dropout(0.1)).eval()
    assert "do not implement" in gate_of_own(Own(lambda self, g, u: self.act(g) * u, act=drops))
    assert not drops.training
    assert "do not implement" in gate_of_own(Noisy(None).eval())
    replaced = build(BY_NAME["Qwen3MoeExperts"])
    replaced._apply_gate = lambda x: silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1]
    assert "is overridden on the instance" in gate_of(replaced)
    stacks = Own(lambda self, g, u: silu(g) * u + self.down_proj.mean())
    assert "AttributeError: 'Own' object has no attribute 'down_proj'" in gate_of_own(stacks)


def test_gates_that_require_another_device():
    def launch(self, g, u):
        raise RuntimeError("expected a CUDA tensor")

    assert gate_of_own(Own(launch)) == "the gate of Own cannot be run on a CPU (RuntimeError: expected a CUDA tensor)"
