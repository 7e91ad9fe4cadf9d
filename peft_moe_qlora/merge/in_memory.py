"""Merging adapters into a model in memory: checks, and the merge of experts. PEFT merges linear layers."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm

from ..experts import QuantizedExperts
from ..layer import ExpertsLora
from ..loading import cast_as_loaded, restore_experts, restore_linear
from ..quantized_linear_lora import QuantizedLinearLora
from ..sharded import engine_of
from ..targets import UNTIE
from .calibration import adapted_projections, config_with_vocabulary, merge_while_running, random_token_ids
from .check import Reference, take_reference

ROUNDINGS = ("second-order", "nearest")
"""How merged experts are requantized."""


def check_options(dtype: torch.dtype | None, rounding: str, calibration: torch.Tensor | None) -> None:
    """Rejects options of `merge_and_unload` with an unknown value or without effect.

    Raises:
        ValueError: an option is invalid; the error names it.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is unknown. Choose one of {ROUNDINGS}.")
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
        raise ValueError(
            f"dtype={dtype} is not supported for merged weights. Choose torch.bfloat16, torch.float16 or "
            "torch.float32."
        )
    if calibration is None:
        return
    if dtype is not None or rounding == "nearest":
        raise ValueError(
            "calibration applies only to second-order rounding of quantized experts. Remove calibration, or remove "
            "dtype and rounding='nearest'."
        )
    if (
        not isinstance(calibration, torch.Tensor)
        or calibration.dim() != 2
        or calibration.is_floating_point()
        or not calibration.numel()
    ):
        is_tensor = isinstance(calibration, torch.Tensor)
        found = f"{calibration.dtype} of shape {list(calibration.shape)}" if is_tensor else type(calibration).__name__
        raise ValueError(
            f"calibration has the wrong type or shape: {found}. Expected a non-empty integer tensor of token ids, "
            "(sequences, length)."
        )


def refuse_taken_apart(model: nn.Module) -> None:
    """Rejects removing layers from a model that an engine shards, even while all parameters are gathered.

    Raises:
        ValueError: the model is sharded; the error names the engine.
    """
    engine = engine_of(model)
    if engine is not None:
        raise ValueError(
            f"The model is sharded by {engine}, whose hooks require the original layers, so adapter layers cannot be "
            "removed. Save the adapter, load it onto its base in one process, and merge or unload it there."
        )


def check_mergeable(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Rejects a damaged adapter before the first layer is merged, so the model stays unchanged.

    The check does not depend on `safe_merge`, because quantized codes cannot represent values that are not finite.

    Args:
        model: the model with the adapters.
        adapter_names: the adapters to merge.

    Raises:
        ValueError: a factor is not finite, or only one of two layers with a shared weight would change.
    """
    _check_not_tied(model, adapter_names)
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for container in layer.adapter_layer_names:
            for name, factor in getattr(layer, container).items():
                tensors = [factor] if isinstance(factor, torch.Tensor) else factor.parameters()
                if name in adapter_names and not all(torch.isfinite(tensor).all() for tensor in tensors):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")


def _check_not_tied(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Rejects a delta of only one of two layers that share a weight, because merging it would change both."""
    holders: dict[nn.Parameter, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[parameter].append(path.removesuffix(".base_layer"))
    for path, layer in model.named_modules():
        if isinstance(layer, (ExpertsLora, QuantizedLinearLora)):
            continue  # tied layers of these classes are merged into separate weights
        if not isinstance(layer, (LoraLayer, TrainableTokensLayer)):
            continue
        own = layer.scaling if isinstance(layer, LoraLayer) else layer.trainable_tokens_delta
        if not any(name in own for name in adapter_names):
            continue
        # PEFT's layer on nn.MultiheadAttention has several weights, none of them tied
        weight = getattr(layer.get_base_layer(), "weight", None)
        others = [
            holder
            for holder in holders.get(weight, ())
            if holder != path and not _has_tokens_of(model.get_submodule(holder), layer)
        ]
        if others:
            changed = path.removesuffix(".token_adapter")
            raise ValueError(
                f"The adapter changes only {changed}, but {others[0]} shares its weight and would also change. {UNTIE}"
            )


def _has_tokens_of(module: nn.Module, layer: BaseTunerLayer) -> bool:
    """Whether a module shares a layer's trained tokens, as PEFT does for tied embeddings."""
    if not isinstance(module, TrainableTokensLayer) or not isinstance(layer, TrainableTokensLayer):
        return False
    return module.trainable_tokens_delta is layer.trainable_tokens_delta


def activate(tuner: LoraModel, adapter_names: Sequence[str]) -> list[str]:
    """Activates and freezes the adapters to merge: those that are named, and those that are already merged.

    For modules trained in full, PEFT uses the active adapter even if another one is named, and it fails at tokens that
    the named adapter does not have.

    Args:
        tuner: the tuner; merged layers stay merged.
        adapter_names: the adapters to merge.

    Returns:
        The names of all activated adapters.

    Raises:
        ValueError: two of them train the same module in full, or its tokens.
    """
    layers = [module for module in tuner.model.modules() if isinstance(module, BaseTunerLayer)]
    names = list(dict.fromkeys([*(name for layer in layers for name in layer.merged_adapters), *adapter_names]))
    wrappers = [module for module in tuner.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    # check all wrappers before changing one
    found = [wrapper.check_set_adapter(names) if names else None for wrapper in wrappers]
    for wrapper, name in zip(wrappers, found):
        wrapper.set_adapter([] if name is None else [name], inference_mode=True)
    for layer in layers:
        if isinstance(layer, LoraLayer):
            layer.set_adapter(names, inference_mode=True)
    tuner.active_adapter = names
    return names


@contextmanager
def restored_on_error(layers: Sequence[ExpertsLora | QuantizedLinearLora]) -> Iterator[None]:
    """Restores the merged adapters of layers if the context ends with a `ValueError`."""
    merged_before = {layer: list(layer.merged_adapters) for layer in layers}
    try:
        yield
    except ValueError:
        for layer, names in merged_before.items():
            if layer.merged_adapters != names:
                layer.unmerge()
                layer.merge(adapter_names=names)
        raise


@contextmanager
def _unmerged(model: nn.Module) -> Iterator[None]:
    """Unmerges all layers. After an error, the remaining layers have the same adapters merged as before."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and layer.merged]
    merged_before = {layer: list(layer.merged_adapters) for layer in layers}
    for layer in layers:
        layer.unmerge()
    try:
        yield
    except BaseException:
        for layer in list(model.modules()):
            if layer in merged_before and not layer.merged:
                layer.merge(adapter_names=merged_before[layer])
        raise


def merge_densely(tuner: LoraModel, adapter_names: Sequence[str], dtype: torch.dtype, progressbar: bool) -> None:
    """Restores the original experts modules and linear layers with merged weights in a floating-point dtype.

    Args:
        tuner: the tuner whose layers on experts and on quantized linear layers are replaced.
        adapter_names: the adapters to merge.
        dtype: dtype of the experts and these linear layers.
        progressbar: whether to show a progress bar.
    """
    kinds = (ExpertsLora, QuantizedLinearLora)
    layers = [(path, layer) for path, layer in tuner.model.named_modules() if isinstance(layer, kinds)]
    for path, layer in tqdm(layers, desc="Merging experts", disable=not progressbar):
        parent, _, name = path.rpartition(".")
        tuner._replace_module(tuner.model.get_submodule(parent), name, layer.merged_dense(dtype, adapter_names), layer)
    restore_linear(tuner.model, dtype)
    restore_experts(tuner.model, dtype)
    if dtype == torch.float32:
        cast_as_loaded(tuner.model, dtype)  # before PEFT adds deltas of linear layers, which 16 bits would round


def merge_for_inputs(
    tuner: LoraModel, adapter_names: Sequence[str], calibration: torch.Tensor | None, progressbar: bool
) -> Reference | None:
    """Merges the adapted quantized experts, rounded for their inputs, and removes their adapter layers.

    Args:
        tuner: the tuner whose layers are merged.
        adapter_names: the adapters to merge, including those that are already merged.
        calibration: `(N, L)` token ids. Default: `random_token_ids`.
        progressbar: whether to show a progress bar.

    Returns:
        The hidden states of the unmerged model; None if there are no such experts.
    """
    model = tuner.model
    experts = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantizedExperts) and not module.is_dense and adapted_projections(module, adapter_names)
    }
    if not experts:
        return None
    if calibration is None:
        config = config_with_vocabulary(model)
        if config is None:
            raise ValueError(
                f"{type(model).__name__} has no config with a vocabulary size, which is required for random "
                "calibration tokens. Pass token ids as calibration, or rounding='nearest'."
            )
        calibration = random_token_ids(config)

    def unwrap(merged: QuantizedExperts) -> None:
        # unwrapped immediately, so a later failure of the forward does not lead to a second merge
        for projection in merged.layout.projections:
            layer = merged.get_submodule(projection)
            if isinstance(layer, ExpertsLora):
                tuner._replace_module(merged, projection, layer.base_layer, layer)

    with _unmerged(model):
        reference = take_reference(tuner, adapter_names, calibration, progressbar)
        missed = merge_while_running(model, experts, adapter_names, calibration, unwrap, progressbar)
    if missed:
        warnings.warn(
            f"The calibration forward did not run {len(missed)} layers of experts, {missed[0]} first. They are "
            "rounded to the nearest value.",
            RuntimeWarning,
            stacklevel=3,
        )
    return reference
