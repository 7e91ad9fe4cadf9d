"""Saving quantized experts in the layout of bitsandbytes, which other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..experts import QuantizedExperts
from ..quantization import QuantizedStack, code_values
from .quantizer import MoeQuantizer


def save_bitsandbytes(model: PreTrainedModel, directory: str | Path, **kwargs: Any) -> None:
    """Saves a model with quantized experts as bitsandbytes' checkpoints are laid out.

    One set of keys per expert and projection, under the names of the original checkpoint; where those are fused, one
    set per stack. Codes are copied; scales in 8 bits are written in fp32, as they are decoded at use. `load_quantized`
    reads it back with the same codes and scales.

    Args:
        model: with quantized experts, without an adapter.
        directory: to be written to.
        kwargs: of `save_pretrained`.

    Raises:
        ValueError: the model's experts are not quantized, or blocks span gate and up projection.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, MoeQuantizer):
        raise ValueError(
            f"{type(model).__name__} was not loaded with MoeQuantizationConfig and has no experts quantized in "
            "memory; there is nothing in 4 bits to save."
        )
    state_dict = bitsandbytes_state_dict(model)
    config = quantizer.quantization_config
    linear_config = config.linear_config()
    linear_config.llm_int8_skip_modules = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    linear_config.bnb_4bit_compute_dtype = config.compute_dtype or model.dtype
    before = getattr(model.config, "quantization_config", None)
    quantizer.state_dict_to_save = state_dict
    model.config.quantization_config = linear_config
    try:
        model.save_pretrained(directory, save_original_format=False, **kwargs)
    finally:
        quantizer.state_dict_to_save = None
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def bitsandbytes_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Everything that a model holds, under the names of its original checkpoint, packed weights as bitsandbytes does.

    Raises:
        ValueError: see `save_bitsandbytes`.
    """
    stacks = {
        f"{path}.{projection}": module.stack(projection)
        for path, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        for projection in module.layout.projections
    }
    of_stacks = tuple(f"{name}." for name in stacks)
    others = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(of_stacks)}
    found = _reverted(model, others)
    for name, stack in stacks.items():
        found |= _of_stack(model, name, stack)
    return found


def _reverted(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of the original checkpoint; without what the model was loaded by, which lacks the experts."""
    before = model.__dict__.pop("_weight_conversions", None)
    try:
        return revert_weight_conversion(model, tensors)
    finally:
        if before is not None:
            model._weight_conversions = before


def _of_stack(model: PreTrainedModel, name: str, stack: nn.Module) -> dict[str, torch.Tensor]:
    num_parts = 1 if name.endswith(("down_proj", ".up_proj")) else 2
    # numbers take the place of the weights, so that transformers' operations show which part goes where
    numbers = torch.arange(stack.num_experts * num_parts).view(-1, num_parts, 1)
    reverted = _reverted(model, {name: numbers})
    if not all(part.numel() == 1 for part in reverted.values()):
        reverted = {name: numbers}
    if not isinstance(stack, QuantizedStack):
        reverted_weights = _reverted(model, {name: stack.weight})
        return {key: tensor.contiguous() for key, tensor in reverted_weights.items()}
    if len(reverted) == 1:
        return _packed(next(iter(reverted)), stack.codes, stack.scales(slice(None)), tuple(stack.shape), stack)
    _, rows, columns = stack.shape
    part_size = rows // num_parts * columns
    if part_size % stack.storage.blocksize or part_size % 2:
        raise ValueError(
            f"{name}: blocks of {stack.storage.blocksize} span gate and up projection ({rows // num_parts} x "
            f"{columns} each), which bitsandbytes' layout has apart. Save with save_pretrained."
        )
    found = {}
    for key, number in reverted.items():
        expert, part = divmod(number.item(), num_parts)
        codes = stack.codes[expert].view(num_parts, -1)[part]
        absmax = stack.scales(slice(expert, expert + 1))[0].view(num_parts, -1)[part]
        found |= _packed(key, codes, absmax, (rows // num_parts, columns), stack)
    return found


def _packed(
    key: str, codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], stack: QuantizedStack
) -> dict[str, torch.Tensor]:
    state = bnb.QuantState(
        absmax=absmax.flatten().clone(),
        shape=torch.Size(shape),
        dtype=stack.dtype,
        blocksize=stack.storage.blocksize,
        quant_type=stack.storage.quant_type,
        code=code_values(stack.storage.quant_type, absmax.device).clone(),
    )
    parts = {f"{key}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {key: codes.reshape(-1, 1).clone(), **parts}
