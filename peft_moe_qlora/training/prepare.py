"""Preparation of a model in memory: quantization of its experts, and setup for training."""

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
        progressbar: show a progress bar.
        storage: name of a format, such as `"fp8/128x128"`, instead of the three 4-bit options.

    Returns:
        Report on the experts.

    Raises:
        ValueError: there are no routed experts, an experts class is not supported, or stacks are offloaded, quantized
            by another library or already stored in another format. The error names the module, and the model is
            unchanged.
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

    Unlike `peft.prepare_model_for_kbit_training`, it does not cast parameters. PEFT's function casts all unquantized
    16-bit parameters to fp32, including experts.

    With `compile_layers` or `cuda_graphs`, this package checkpoints the layers, and `gradient_checkpointing=True` in
    TrainingArguments has no effect.

    Args:
        model: a transformers model with quantized or unquantized experts.
        use_gradient_checkpointing: True recomputes each decoder layer in the backward. `"keep-experts"` recomputes all
            of a layer except its experts, whose products take most of the time; the fused kernels save `(T * K, 2I)`
            activations per layer for that. False saves all activations.
        gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`. Default:
            `{"use_reentrant": False}`.
        compile_layers: compile each decoder layer with `torch.compile`, for training.
        cuda_graphs: capture forward and backward of each decoder layer in CUDA graphs, for training. An input shape is
            captured on its second occurrence, so pad or pack sequences to few lengths. `graphs_report(model)` lists
            the captured graphs.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: the model already has an adapter, which would be frozen too; its layers are already prepared; or
            `gradient_checkpointing_kwargs` are given for layers that this package checkpoints.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The model already has an adapter, which would be frozen too. Call prepare_model_for_training before "
            "get_peft_model."
        )
    if use_gradient_checkpointing not in (True, False, "keep-experts"):
        raise ValueError(
            f"use_gradient_checkpointing={use_gradient_checkpointing!r} is not valid. Expected True, False or "
            '"keep-experts".'
        )
    is_run = compile_layers or cuda_graphs
    if is_run and gradient_checkpointing_kwargs is not None:
        raise ValueError(
            "gradient_checkpointing_kwargs apply to torch's checkpointing, which compile_layers and cuda_graphs "
            'replace. Remove them, or set use_gradient_checkpointing="keep-experts".'
        )
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        kwargs = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        if use_gradient_checkpointing == "keep-experts":
            kwargs = {**kwargs, "context_fn": keep_experts}
        # the name in newer versions of transformers, or the older name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(kwargs)
        # reentrant checkpointing computes gradients only if its input requires them
        model.enable_input_require_grads()
    if is_run:
        keep = {True: "nothing", False: "everything"}.get(use_gradient_checkpointing, "experts")
        run_layers(model, RunSettings(keep, compile_layers, cuda_graphs))
    return model
