"""The arms of the comparison: one experts layer, computed by transformers, PEFT and this package.

All arms of a shape have the same 16-bit weights before quantization and, if they have factors, the same factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shapes import DTYPE, Shape
from torch import nn
from transformers import PreTrainedConfig

from peft_moe_qlora import MoeQLoraConfig, QuantizedExperts, quantize_experts

RANK = 16
ALPHA = 32
B_STD = 0.02
BATCHED_MM_TOKENS = 128
"""Largest number of tokens for which `batched_mm` is tried: it gathers one matrix per routed pair."""


@dataclass(frozen=True)
class Factors:
    """The trainable factors of one projection.

    Args:
        A: parameter; per expert `(E, R, in)`.
        B: parameter; per expert `(E, out, R)`.
        scaling: `delta[e] = scaling * B[e] @ A[e]`.
        is_packed: whether both are 2-D, as in PEFT's `target_parameters`: A `(E * R, in)`, B `(out, R * E)`.
    """

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    is_packed: bool = False

    def per_expert(self, A: torch.Tensor, B: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reshapes the parameters or their gradients to one matrix per expert."""
        if not self.is_packed:
            return A, B
        return A.unflatten(0, (num_experts, -1)), B.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


@dataclass
class Layer:
    """One arm, ready to run.

    Args:
        shape: shape of the layer.
        module: module called with `Inputs.arguments`; returns `(T, H)`.
        matrix: projection, expert -> frozen `(out, in)` weights in fp32, as stored.
        bias: projection, expert -> `(out,)` bias in fp32, or None.
        factors: projection -> trainable factors; empty for an arm without LoRA.
        stack_bytes: bytes of the frozen weights, including scales.
        computed_by: one line on the implementation.
        config: config from which transformers' forward reads its implementation; None for other forwards.
    """

    shape: Shape
    module: nn.Module
    matrix: Callable[[str, int], torch.Tensor]
    bias: Callable[[str, int], torch.Tensor | None]
    factors: dict[str, Factors]
    stack_bytes: int
    computed_by: str
    config: PreTrainedConfig | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for factors in self.factors.values() for parameter in (factors.A, factors.B)]

    def implementations(self, num_tokens: int, needs_gradients: bool) -> tuple[str, ...]:
        """Implementations of transformers' forward to try; one empty name if there is no choice."""
        if self.config is None:
            return ("",)
        if needs_gradients or num_tokens > BATCHED_MM_TOKENS:
            return ("grouped_mm",)
        return ("grouped_mm", "batched_mm")

    def use(self, implementation: str) -> None:
        if self.config is not None:
            self.config._experts_implementation = implementation


class Block(nn.Module):
    """The parent of experts in a model."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


@torch.no_grad()
def _randomize(factors: dict[str, Factors], num_experts: int, seed: int) -> None:
    """Sets the same values in all arms; B is not zero, so that A gets a gradient."""
    for index, of_projection in enumerate(factors.values()):
        A, B = of_projection.per_expert(of_projection.A, of_projection.B, num_experts)
        generator = torch.Generator(A.device).manual_seed(seed + index)
        for values, std in ((A, A.shape[-1] ** -0.5), (B, B_STD)):
            values.copy_(std * torch.randn(values.shape, generator=generator, device=values.device))


def _plain_matrix(experts: nn.Module, projection: str, expert: int) -> torch.Tensor:
    weights = experts.get_parameter(projection)[expert].detach().float()
    return weights.T if experts.is_transposed else weights


def _plain_bias(experts: nn.Module, projection: str, expert: int) -> torch.Tensor | None:
    if not experts.has_bias:
        return None
    return experts.get_parameter(f"{projection}_bias")[expert].detach().float()


def _plain_layer(shape: Shape, module: nn.Module, experts: nn.Module, factors: dict[str, Factors]) -> Layer:
    return Layer(
        shape,
        module,
        partial(_plain_matrix, experts),
        partial(_plain_bias, experts),
        factors,
        sum(experts.get_parameter(name).nbytes for name in ("gate_up_proj", "down_proj")),
        f"{shape.class_name} of transformers",
        experts.config,
    )


def build_transformers(shape: Shape, device: torch.device, seed: int) -> Layer:
    """The layer of transformers, without quantization and LoRA."""
    experts = shape.experts(device, seed)
    return _plain_layer(shape, experts, experts, {})


def _adapted(model: PeftModel) -> nn.Module:
    return model.get_base_model().experts


def build_peft(shape: Shape, device: torch.device, seed: int) -> Layer:
    """PEFT's LoRA on parameters, which merges the delta into the whole stack in every forward."""
    experts = shape.experts(device, seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    module = wrapper = _adapted(get_peft_model(Block(experts), config))
    of_projection = {}
    while wrapper is not experts:
        A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        of_projection[wrapper.parameter_name] = Factors(A, B, wrapper.scaling["default"], is_packed=True)
        wrapper = wrapper.base_layer
    factors = {projection: of_projection[projection] for projection in ("gate_up_proj", "down_proj")}
    _randomize(factors, shape.num_experts, seed)
    layer = _plain_layer(shape, module, experts, factors)
    layer.computed_by += ", with stacks merged by PEFT in every forward"
    return layer


def build_ours(shape: Shape, device: torch.device, seed: int, storage: str | None) -> Layer:
    """This package's layer."""
    block = Block(shape.experts(device, seed))
    if storage is not None:
        quantize_experts(block, storage=storage, progressbar=False)
    config = MoeQLoraConfig(r=RANK, lora_alpha=ALPHA, storage=storage, quant_type=None)
    model = get_peft_model(block, config)
    module: QuantizedExperts = _adapted(model)
    layers = {projection: module.get_submodule(projection) for projection in module.layout.projections}
    factors = {
        projection: Factors(*layer.factors("default"), layer.scaling["default"])
        for projection, layer in layers.items()
    }
    _randomize(factors, shape.num_experts, seed)

    def matrix(projection: str, expert: int) -> torch.Tensor:
        stack = module.stack(projection)
        weights = stack.decode_expert(expert, torch.float32)
        return weights.T if stack.is_transposed else weights

    def bias(projection: str, expert: int) -> torch.Tensor | None:
        biases = module.projection_bias(projection)
        return None if biases is None else biases[expert].detach().float()

    report = model.experts_report()
    paths = dict.fromkeys(stack.compute_path for stack in report.stacks)
    return Layer(shape, module, matrix, bias, factors, report.nbytes, "; ".join(paths))


ARMS: dict[str, Callable[[Shape, torch.device, int], Layer]] = {
    "transformers": build_transformers,
    "peft": build_peft,
    "ours-bf16": partial(build_ours, storage=None),
    "ours-nf4": partial(build_ours, storage="nf4/64"),
    "ours-nf4-nested": partial(build_ours, storage="nf4/64+dq"),
    "ours-fp8": partial(build_ours, storage="fp8/128x128"),
    "ours-int8": partial(build_ours, storage="int8/channel"),
    "ours-mxfp4": partial(build_ours, storage="mxfp4"),
    "ours-int4": partial(build_ours, storage="int4/32+bf16"),
    "ours-nvfp4": partial(build_ours, storage="nvfp4"),
}
"""Name -> `(shape, device, seed)` -> layer."""

DESCRIPTIONS = {
    "transformers": f"{DTYPE} weights, no LoRA".replace("torch.", ""),
    "peft": f"PEFT target_parameters, rank {RANK}, on the transformers layer",
    "ours-bf16": f"this package, rank {RANK}, weights left in 16 bits",
    "ours-nf4": f"this package, rank {RANK}, weights in NF4",
    "ours-nf4-nested": f"this package, rank {RANK}, weights in NF4 with 8-bit scales",
    "ours-fp8": f"this package, rank {RANK}, weights in FP8, blocks of 128 x 128",
    "ours-int8": f"this package, rank {RANK}, weights in int8, a scale for each row",
    "ours-mxfp4": f"this package, rank {RANK}, weights in MXFP4",
    "ours-int4": f"this package, rank {RANK}, weights in int4, groups of 32",
    "ours-nvfp4": f"this package, rank {RANK}, weights in NVFP4",
}
