"""Saves quantized experts in the checkpoint layout of bitsandbytes, which other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..progress import PATIENCE
from ..quantization import FourBitFormat, QuantizedStack, Stack, code_values
from ..quantized_linear import QuantizedLinear
from ..sharded import refuse_sharded
from .finder import conversions_of, without_stacks
from .quantizer import MoeQuantizer, check_linear_can_be_saved, flipped_stacks, quantized_stacks
from .restoring import refuse_adapters


def save_bitsandbytes(model: PreTrainedModel, directory: str | Path, **kwargs: Any) -> None:
    """Saves a model with quantized experts in the checkpoint layout of bitsandbytes.

    There is one set of keys per expert and projection, under the names of the original checkpoint. If the original has
    fused stacks, there is one set per stack; if it orders weights differently, the names of the model are used. Codes
    are copied; 8-bit scales are written in fp32, as dequantized at run time. `load_quantized` reloads the same codes
    and scales.

    Args:
        model: model with quantized experts, without an adapter.
        directory: output directory.
        kwargs: arguments of `save_pretrained`.

    Raises:
        ValueError: the model has an adapter or is sharded over processes, its experts are not quantized, or in a
            format that bitsandbytes does not support, or blocks span gate and up projection.
    """
    refuse_adapters(model)
    refuse_sharded(model, "saving the whole model")
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, MoeQuantizer):
        raise ValueError(
            f"{type(model).__name__} has no quantized experts to save. Load it with MoeQuantizationConfig, or call "
            "quantize_experts first."
        )
    state_dict = bitsandbytes_state_dict(model)
    config = quantizer.quantization_config
    linear_config = config.linear_config()
    linear_config.llm_int8_skip_modules = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    linear_config.bnb_4bit_compute_dtype = config.compute_dtype or model.dtype
    packed = (module.weight.dtype for module in model.modules() if isinstance(module, Linear4bit))
    linear_config.bnb_4bit_quant_storage = next(packed, torch.uint8)
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
    """The state dict of a model under the names of its original checkpoint, with packed weights as in bitsandbytes.

    Raises:
        ValueError: see `save_bitsandbytes`.
    """
    stacks = {name: stack for name, _, stack in quantized_stacks(model)}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, module in {**stacks, **layers}.items():
        if not isinstance(module.storage, (FourBitFormat, type(None))):
            raise ValueError(
                f"{name} is stored as {module.storage}, which bitsandbytes does not support. Save with "
                "save_pretrained, or load with MoeQuantizationConfig(quant_type='nf4', packed_linear='4 bits')."
            )
    check_linear_can_be_saved(model, without_stacks(conversions_of(model)))
    of_stacks = tuple(f"{name}." for name in stacks)
    others = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(of_stacks)}
    found = _reverted(model, others)
    flipped = set(flipped_stacks(model))
    for name, stack in tqdm(stacks.items(), desc="Packing experts", unit="stack", delay=PATIENCE):
        found |= _of_stack(model, name, stack, name in flipped)
    return found


def _reverted(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in the layout of the original checkpoint, ignoring recorded conversions, which lack the experts."""
    before = model.__dict__.pop("_weight_conversions", None)
    try:
        return revert_weight_conversion(model, tensors)
    finally:
        if before is not None:
            model._weight_conversions = before


def _of_stack(model: PreTrainedModel, name: str, stack: Stack, is_flipped: bool) -> dict[str, torch.Tensor]:
    projection = name.rpartition(".")[2]
    num_parts = 2 if projection == "gate_up_proj" else 1
    keys = keys_of_parts(model, name, stack.num_experts, num_parts)
    if not isinstance(stack, QuantizedStack):
        weights = {keys: stack.weight} if isinstance(keys, str) else _reverted(model, {name: stack.weight})
        return {key: tensor.contiguous() for key, tensor in weights.items()}
    if is_flipped:
        names = ("gate_proj", "up_proj") if num_parts == 2 else (projection,)
        path = name.rpartition(".")[0]
        keys = [f"{path}.{expert}.{part}.weight" for expert in range(stack.num_experts) for part in names]
    if isinstance(keys, str):
        return _packed(keys, stack.codes, stack.scales(slice(None)), tuple(stack.shape), stack)
    _, rows, columns = stack.shape
    part_size = rows // num_parts * columns
    if part_size % stack.storage.blocksize or part_size % 2:
        raise ValueError(
            f"{name}: blocks of {stack.storage.blocksize} weights span gate and up projection ({rows // num_parts} x "
            f"{columns} each), which the layout of bitsandbytes stores separately. Save with save_pretrained."
        )
    found = {}
    for number, key in enumerate(keys):
        expert, part = divmod(number, num_parts)
        codes = stack.codes[expert].view(num_parts, -1)[part]
        absmax = stack.scales(slice(expert, expert + 1))[0].view(num_parts, -1)[part]
        found |= _packed(key, codes, absmax, (rows // num_parts, columns), stack)
    return found


def keys_of_parts(model: PreTrainedModel, name: str, num_experts: int, num_parts: int) -> list[str] | str:
    """The keys of all parts of a stack, expert by expert, gate before up; or the key of the fused stack."""
    # numbers replace the weights, 2 x 2 for each part, and show the mapping in the converted tensors
    numbers = torch.arange(num_experts * num_parts * 4).view(num_experts, -1, 2)
    try:
        reverted = _reverted(model, {name: numbers})
    except (AttributeError, ValueError):
        # operations that need the shape of a parameter, or several stacks at once
        return name
    in_order = sorted(reverted, key=lambda key: reverted[key].flatten()[0].item())
    parts = numbers.view(-1, 2, 2)
    if len(in_order) == len(parts) and all(torch.equal(reverted[key], part) for key, part in zip(in_order, parts)):
        return in_order
    if len(in_order) == 1 and torch.equal(reverted[in_order[0]], numbers):
        return in_order[0]
    return name


def key_of_tensor(model: PreTrainedModel, name: str) -> str | None:
    """The key of a parameter in the original checkpoint; None if it is not a separate tensor there."""
    numbers = torch.arange(16).view(4, 4)
    try:
        reverted = _reverted(model, {name: numbers})
    except (AttributeError, RuntimeError, ValueError):
        return None
    key, found = next(iter(reverted.items()))
    return key if len(reverted) == 1 and torch.equal(found, numbers) else None


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
