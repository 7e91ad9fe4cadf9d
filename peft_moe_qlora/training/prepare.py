"""Preparing a model in memory: quantizing its experts, and freezing it for training."""

from __future__ import annotations

from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..loading import store_experts
from ..ops import keep_experts
from ..quantization import format_of
from ..report import ExpertsReport, experts_report
from .layer_runner import RunSettings, run_layers


def quantize_experts(
    model: nn.Module,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    progressbar: bool = True,
    storage: str | None = None,
) -> ExpertsReport:
    """Quantizes all routed experts of a model in place, each on its device.

    Each 16-bit stack is freed before the next one is quantized, so peak memory is the model plus one quantized stack.
    The quantized model also runs without an adapter.

    Args:
        model: a model with decorated experts classes in fp16, bf16 or fp32.
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: number of weights that share a scale.
        double_quant: store the scales in 8 bits.
        progressbar: show one.
        storage: a format by its name, such as `"fp8/128x128"`, instead of the three options of 4 bits.

    Returns:
        What is stored how.

    Raises:
        ValueError: no routed experts, an experts class that is not supported, stacks that are offloaded, packed by
            another quantizer or stored otherwise already. The error names the module, and the model is unchanged.
    """
    store_experts(model, format_of(storage, quant_type, blocksize, double_quant), progressbar)
    return experts_report(model)


def prepare_model_for_training(
    model: nn.Module,
    use_gradient_checkpointing: bool | Literal["keep-experts"] = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    compile_layers: bool = False,
    cuda_graphs: bool = False,
) -> nn.Module:
    """Freezes a base model and sets up checkpointing, compilation and CUDA graphs; call it before `get_peft_model`.

    Unlike `peft.prepare_model_for_kbit_training`, it casts nothing: PEFT's function casts every 16-bit parameter
    that it does not know to fp32, experts included.

    With `compile_layers` or `cuda_graphs`, this package checkpoints the layers, and a Trainer's
    `gradient_checkpointing=True` has no effect.

    Args:
        model: a transformers model, its experts quantized or not.
        use_gradient_checkpointing: what the backward computes again. True: each decoder layer, from its input.
            `"keep-experts"`: all of a layer but its experts, whose products take most of the time; what the fused
            kernels need for that, `(T * K, 2I)` for each layer, is kept. False: nothing.
        gradient_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`. Default: `{"use_reentrant": False}`.
        compile_layers: compile each decoder layer with `torch.compile`, for training.
        cuda_graphs: capture forward and backward of each decoder layer in CUDA graphs, for training. A shape of
            inputs is captured when it comes for the second time, so pad or pack to few lengths. `graphs_report(model)`
            says what is captured.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: the model has an adapter already, which would be frozen too; the layers have been set up before;
            or `gradient_checkpointing_kwargs` are given for layers that this package checkpoints.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model has an adapter, which would be frozen too. Prepare it before get_peft_model.")
    if use_gradient_checkpointing not in (True, False, "keep-experts"):
        raise ValueError(
            f"use_gradient_checkpointing={use_gradient_checkpointing!r} is not known; it is True, False or "
            '"keep-experts".'
        )
    is_run = compile_layers or cuda_graphs
    if is_run and gradient_checkpointing_kwargs is not None:
        raise ValueError(
            "gradient_checkpointing_kwargs are those of torch's checkpointing, which compile_layers and cuda_graphs "
            'replace by their own. Leave them out, or say use_gradient_checkpointing="keep-experts".'
        )
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        kwargs = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        if use_gradient_checkpointing == "keep-experts":
            kwargs = {**kwargs, "context_fn": keep_experts}
        # its name in newer versions of transformers, or the older one
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(kwargs)
        # reentrant checkpointing computes gradients only if its input requires them
        model.enable_input_require_grads()
    if is_run:
        keep = {True: "nothing", False: "everything"}.get(use_gradient_checkpointing, "experts")
        run_layers(model, RunSettings(keep, compile_layers, cuda_graphs))
    return model
