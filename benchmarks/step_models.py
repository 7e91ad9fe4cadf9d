"""Builds a model with random weights and its adapter, layer by layer, so that it is never whole in 16 bits.

Only the experts of the first layer are sampled and quantized; those of the other layers are copies, which is much
faster. Routers, norms and attention are sampled for each layer.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator

import bitsandbytes
import torch
import unsloth_experts
from models import model_config
from peft import LoraConfig, PeftModel, get_peft_model
from step_settings import Arm, Plan
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_moe_qlora import MoeQLoraConfig, prepare_model_for_training, quantize_experts
from peft_moe_qlora.quantization import FourBitFormat, parse_format
from peft_moe_qlora.quantized_linear import QuantizedLinear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
WEIGHT_STD = 0.02
B_STD = 0.01


class Block(nn.Module):
    """The parent of experts in a model."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def build(plan: Plan, share_experts: bool = False) -> PeftModel:
    """Builds the model with its adapter, in training mode; B is not zero, so that A gets a gradient.

    Args:
        plan: the configuration.
        share_experts: whether all layers share the memory of the first layer's experts, for callers that copy them,
            such as sharding.

    Raises:
        ValueError: Liger does not support the model, or unsloth_zoo its experts.
        ImportError: Liger or unsloth_zoo is required and not installed.
    """
    config = model_config(plan.shape, plan.layers, plan.dtype)
    config.use_cache = False
    if plan.arm.has("liger") or plan.arm.has("liger-head"):
        apply_liger(config.model_type, head_only=plan.arm.has("liger-head"))
    if plan.arm.name == "unsloth":
        unsloth_experts.apply(config.model_type)
    options = {} if plan.attention is None else {"attn_implementation": plan.attention}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, plan.dtype), **options)
    _fill(model, plan, share_experts)
    torch.manual_seed(plan.seed)
    model = _adapted(model, plan)
    _start_factors(model, plan)
    return model.train()


def apply_liger(model_type: str, head_only: bool = False) -> None:
    """Applies Liger to the classes of a model, except its experts, for the rest of the process.

    Args:
        model_type: type of the model.
        head_only: apply only the fused linear cross entropy, without norms and rotary embedding.

    Raises:
        ImportError: Liger is not installed.
        ValueError: Liger does not support the model.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ImportError(
            "+liger requires liger-kernel, which is not installed. Run pip install liger-kernel."
        ) from error
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"+liger: Liger has no kernels for {model_type}. Remove +liger for this shape.")
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    # Liger's swiglu would replace the experts' forward
    left_out = ("swiglu", "rms_norm", "rope") if head_only else ("swiglu",)
    apply(**{name: False for name in left_out if name in inspect.signature(apply).parameters})


def _fill(model: PreTrainedModel, plan: Plan, share_experts: bool) -> None:
    """Replaces the weights of a model on the meta device by random ones on the plan's device."""
    generator = torch.Generator(plan.device).manual_seed(plan.seed)
    first: nn.Module | None = None
    # first, while there is enough memory for a 16-bit layer
    for parent in [module for module in model.modules() if hasattr(module, "experts")]:
        # copies of unsloth_zoo's experts would lose the shape that is stored with the weights
        if first is None or plan.arm.name == "unsloth":
            first = parent.experts = _first_experts(parent.experts, plan, generator)
        else:
            parent.experts = _copied(first, share_experts)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and name in ATTENTION:
                _draw(layer, plan, generator)
                setattr(parent, name, _stored(layer, plan.arm))
    for module in model.modules():
        _draw(module, plan, generator)
    # buffers are computed, not sampled
    with torch.device(plan.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ValueError(
            f"{plan.shape}: {', '.join(left)} have no weights. Only layers like those of Qwen3 are supported."
        )
    if plan.arm.name == "ours":
        # the experts are already quantized; this informs transformers and PEFT
        quantize_experts(model, storage=plan.arm.storage, progressbar=False)
    if plan.arm.name == "unsloth":
        # PEFT reads these attributes for LoRA on 4-bit linear layers
        model.is_loaded_in_4bit = model.is_quantized = True
        model.quantization_method = "bitsandbytes"


def _first_experts(experts: nn.Module, plan: Plan, generator: torch.Generator) -> nn.Module:
    _draw(experts, plan, generator)
    if plan.arm.name == "unsloth":
        return unsloth_experts.packed(experts)
    if plan.arm.name != "ours":
        return experts
    block = Block(experts)
    quantize_experts(block, storage=plan.arm.storage, progressbar=False)
    return block.experts


def _copied(experts: nn.Module, shares_memory: bool) -> nn.Module:
    """Copies experts but keeps the config object, which transformers may change for all layers."""
    config = getattr(experts, "config", None)
    same = {} if config is None else {id(config): config}
    if shares_memory:
        same |= {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in experts.parameters()}
    return copy.deepcopy(experts, same)


@torch.no_grad()
def _draw(module: nn.Module, plan: Plan, generator: torch.Generator) -> None:
    """Initializes the direct parameters of a module on the meta device with random values."""
    for name, parameter in list(module._parameters.items()):
        if parameter is None or not parameter.is_meta:
            continue
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=plan.device)
        if values.ndim == 1:
            values.fill_(1.0 if name == "weight" else 0.0)  # norms; biases and attention sinks
        else:
            for part in values if values.ndim == 3 else [values]:
                part.normal_(std=WEIGHT_STD, generator=generator)
        setattr(module, name, nn.Parameter(values, requires_grad=False))


def _stored(layer: nn.Linear, arm: Arm) -> nn.Module:
    """A linear layer in the storage of the arm."""
    if arm.name == "unsloth":
        return _in_4_bits(layer)
    if arm.name != "ours":
        return layer
    storage = parse_format(arm.storage)
    return _in_4_bits(layer) if isinstance(storage, FourBitFormat) else QuantizedLinear.from_linear(layer, storage)


def _in_4_bits(layer: nn.Linear) -> bitsandbytes.nn.Linear4bit:
    has_bias = layer.bias is not None
    stored = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=has_bias,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=stored)
    stored.weight = weight.to(layer.weight.device)
    if has_bias:
        stored.bias = layer.bias
    return stored


def _adapted(model: PreTrainedModel, plan: Plan) -> PeftModel:
    if plan.arm.is_ours:
        prepare_model_for_training(model, **plan.arm.prepare_options)
        storage = {"quant_type": None} if plan.arm.storage is None else {"storage": plan.arm.storage}
        ranks = {"r": plan.rank, "expert_r": plan.expert_rank, "lora_alpha": 2 * plan.rank}
        return get_peft_model(model, MoeQLoraConfig(target_modules=["experts", *ATTENTION], **ranks, **storage))
    if plan.arm.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": plan.arm.has("reentrant")})
        model.enable_input_require_grads()
    options = {}
    if plan.arm.name != "attention":
        experts = dict.fromkeys((*EXPERTS, "experts"), plan.expert_rank)
        options = {"target_parameters": list(EXPERTS), "rank_pattern": experts}
    model = get_peft_model(
        model, LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=list(ATTENTION), **options)
    )
    if plan.arm.has("compile"):
        for layer in model.get_base_model().model.layers:
            layer.compile()
    return model


@torch.no_grad()
def _start_factors(model: nn.Module, plan: Plan) -> None:
    generator = torch.Generator(plan.device).manual_seed(plan.seed + 1)
    for name, factor in factors(model):
        if "lora_B" in name:
            factor.normal_(std=B_STD, generator=generator)
    for _, factor in factors(model):
        if plan.noise:
            noise = torch.randn(factor.shape, generator=generator, device=factor.device)
            factor.mul_(1 + plan.noise * noise)
        if plan.arm.has("bf16-factors"):
            factor.data = factor.data.to(getattr(torch, plan.dtype))


def factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`(name, parameter)` of the trainable parameters."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def head_alone(model: PeftModel, hidden_states: torch.Tensor) -> Callable[..., object]:
    """The forward of head and loss only, on hidden states of the last layer.

    Args:
        model: the model, which is not changed.
        hidden_states: hidden states that replace the output of the decoder.
    """
    base = model.get_base_model()
    head = copy.copy(base)
    head._modules = {**base._modules, base.base_model_prefix: _Given(hidden_states)}
    head._forward_pre_hooks, head._forward_hooks = OrderedDict(), OrderedDict()  # of layers, which do not run
    return head


class _Given(nn.Module):
    """Replaces a decoder by given hidden states."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, **kwargs: object):
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.hidden_states)
