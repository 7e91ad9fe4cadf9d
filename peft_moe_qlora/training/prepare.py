"""Preparation of a model in memory: quantization of its experts, and setup for training."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..loading import store_experts
from ..quantization import format_of
from ..report import ExpertsReport, experts_report
from .layer_runner import RunSettings, check_layers, run_layers


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

    With `"keep-experts"`, `compile_layers` or `cuda_graphs`, this package checkpoints the layers, and
    `gradient_checkpointing` in TrainingArguments has no effect.

    Args:
        model: a transformers model with quantized or unquantized experts.
        use_gradient_checkpointing: True recomputes each decoder layer in the backward. `"keep-experts"` recomputes all
            of a layer except its experts, whose products take most of the time; the fused kernels save `(T * K, 2I)`
            activations per layer for that. False saves all activations.
        gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`; default:
            `{"use_reentrant": False}`. Without checkpointing they have no effect, as in PEFT.
        compile_layers: compile each decoder layer with `torch.compile`, for training.
        cuda_graphs: capture forward and backward of each decoder layer in CUDA graphs, for training. An input shape is
            captured on its second occurrence, so pad or pack sequences to few lengths. `graphs_report(model)` lists
            the captured graphs.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: the model is not a transformers model.
        ValueError: the model already has an adapter, which would be frozen too; its layers are already prepared or
            cannot be; or `gradient_checkpointing_kwargs` are unknown, or given for layers that this package
            checkpoints. The model is unchanged.
    """
    _check_model(model)
    if use_gradient_checkpointing not in (True, False, "keep-experts"):
        raise ValueError(
            f"use_gradient_checkpointing={use_gradient_checkpointing!r} is not valid. Expected True, False or "
            '"keep-experts".'
        )
    settings = None
    if compile_layers or cuda_graphs or use_gradient_checkpointing == "keep-experts":
        keep = {True: "nothing", False: "everything"}.get(use_gradient_checkpointing, "experts")
        settings = RunSettings(keep, compile_layers, cuda_graphs)
    check_layers(model, settings)
    if gradient_checkpointing_kwargs is not None:
        _check_checkpointing(gradient_checkpointing_kwargs, settings)
    model.requires_grad_(False)
    # the name in newer versions of transformers, or the older name
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if use_gradient_checkpointing:
        kwargs = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        getattr(model, f"{prefix}_checkpointing_enable")(kwargs)
        # reentrant checkpointing computes gradients only if its input requires them
        model.enable_input_require_grads()
    elif getattr(model, f"is_{prefix}_checkpointing"):
        getattr(model, f"{prefix}_checkpointing_disable")()
    if settings is not None:
        run_layers(model, settings)
    return model


def _check_model(model: nn.Module) -> None:
    is_adapted = isinstance(model, nn.Module) and any(isinstance(one, BaseTunerLayer) for one in model.modules())
    if is_adapted or isinstance(model, PeftModel):
        raise ValueError(
            "The model already has an adapter, which would be frozen too. Call prepare_model_for_training before "
            "get_peft_model."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Found a {type(model).__name__}. Expected a transformers model, loaded by from_pretrained.")


def _check_checkpointing(kwargs: dict[str, Any], settings: RunSettings | None) -> None:
    if settings is not None:
        raise ValueError(
            f"gradient_checkpointing_kwargs={kwargs} apply to torch's checkpointing of whole layers, which "
            'use_gradient_checkpointing="keep-experts", compile_layers and cuda_graphs replace. Remove them.'
        )
    known = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"function", "args", "kwargs"}
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise ValueError(
            f"gradient_checkpointing_kwargs contain {unknown}, which torch.utils.checkpoint.checkpoint does not have; "
            f'it has {sorted(known)}. To save some activations, set use_gradient_checkpointing="keep-experts".'
        )
