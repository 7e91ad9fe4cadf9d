"""Merging adapters into a model in memory: what is refused, and the experts' part of it. Linear layers are PEFT's."""

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
"""How merged experts become codes again."""


def check_options(dtype: torch.dtype | None, rounding: str, calibration: torch.Tensor | None) -> None:
    """Refuses options of `merge_and_unload` that have no such value, or no effect.

    Raises:
        ValueError: names the option.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is unknown; choose one of {ROUNDINGS}.")
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
        raise ValueError(f"dtype={dtype} can't hold merged weights; choose torch.bfloat16, float16 or float32.")
    if calibration is None:
        return
    if dtype is not None or rounding == "nearest":
        raise ValueError(
            "calibration is for experts that are rounded to 4 bits by second-order rounding; leave it out, or "
            "dtype and rounding."
        )
    if (
        not isinstance(calibration, torch.Tensor)
        or calibration.dim() != 2
        or calibration.is_floating_point()
        or not calibration.numel()
    ):
        raise ValueError("calibration has to be a tensor of token ids, (sequences, length), and not empty.")


def refuse_taken_apart(model: nn.Module) -> None:
    """Refuses to take layers away from a model that an engine shards, even while all of it is gathered.

    Raises:
        ValueError: names the engine.
    """
    engine = engine_of(model)
    if engine is not None:
        raise ValueError(
            f"The model is sharded by {engine}, which runs and frees it layer by layer and would miss those that are "
            "taken away. Save the adapter, load it onto its base in one process, and do it there."
        )


def check_mergeable(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Refuses a broken adapter before the first layer is merged, so that the model stays as it was.

    With or without `safe_merge`: 4-bit codes could not show what is not finite.

    Args:
        model: with the adapters in it.
        adapter_names: what is going to be merged.

    Raises:
        ValueError: a factor is not finite, or only one of two layers with a common weight would change.
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
    """Refuses a delta of one of two layers that have one weight: merged, it would be in both."""
    holders: dict[nn.Parameter, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[parameter].append(path.removesuffix(".base_layer"))
    for path, layer in model.named_modules():
        if isinstance(layer, (ExpertsLora, QuantizedLinearLora)):
            continue  # two that are tied are merged into two
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
                f"The adapter changes {changed} alone, but {others[0]} has the same weight and would change too. "
                f"{UNTIE}"
            )


def _has_tokens_of(module: nn.Module, layer: BaseTunerLayer) -> bool:
    """Whether a module shares the tokens that a layer trains, as PEFT has it where embeddings are tied."""
    if not isinstance(module, TrainableTokensLayer) or not isinstance(layer, TrainableTokensLayer):
        return False
    return module.trainable_tokens_delta is layer.trainable_tokens_delta


def activate(tuner: LoraModel, adapter_names: Sequence[str]) -> list[str]:
    """Makes what is to be merged the active adapters, frozen: those that are named, and those that are merged already.

    PEFT leaves modules trained in full to the active adapter, whichever is named, and fails at tokens that the named
    one doesn't have.

    Args:
        tuner: merged layers stay so.
        adapter_names: what to merge.

    Returns:
        The names of all.

    Raises:
        ValueError: two of them have a module trained in full, or its tokens.
    """
    layers = [module for module in tuner.model.modules() if isinstance(module, BaseTunerLayer)]
    names = list(dict.fromkeys([*(name for layer in layers for name in layer.merged_adapters), *adapter_names]))
    wrappers = [module for module in tuner.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    # all are asked before one is changed
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
    """Gives layers back what they had merged when the context began, if a `ValueError` ends it."""
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
    """Unmerges all layers. After an error those that are left have the same adapters merged as before."""
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
    """Gives the classes' own experts modules and linear layers back, merged, in a floating dtype.

    Args:
        tuner: whose layers on experts, and on linear layers that are stored in a format, are taken away.
        adapter_names: what to merge.
        dtype: of the experts and these linear layers.
        progressbar: show one.
    """
    kinds = (ExpertsLora, QuantizedLinearLora)
    layers = [(path, layer) for path, layer in tuner.model.named_modules() if isinstance(layer, kinds)]
    for path, layer in tqdm(layers, desc="Merging experts", disable=not progressbar):
        parent, _, name = path.rpartition(".")
        tuner._replace_module(tuner.model.get_submodule(parent), name, layer.merged_dense(dtype, adapter_names), layer)
    restore_linear(tuner.model, dtype)
    restore_experts(tuner.model, dtype)
    if dtype == torch.float32:
        cast_as_loaded(tuner.model, dtype)  # before deltas of linear layers are added, which 16 bits would round


def merge_for_inputs(
    tuner: LoraModel, adapter_names: Sequence[str], calibration: torch.Tensor | None, progressbar: bool
) -> Reference | None:
    """Merges the quantized experts that adapters reach, rounded for their inputs, and takes their layers away.

    Args:
        tuner: whose layers are merged.
        adapter_names: what to merge, with what is merged already.
        calibration: `(N, L)` token ids. Default: `random_token_ids`.
        progressbar: show one.

    Returns:
        What the model gave before the merge; None if there are no such experts.
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
                f"{type(model).__name__} has no config that tells its vocabulary. Pass token ids as calibration, or "
                "rounding='nearest'."
            )
        calibration = random_token_ids(config)

    def unwrap(merged: QuantizedExperts) -> None:
        # each at once: should the forward fail later, what is merged is not merged again
        for projection in merged.layout.projections:
            layer = merged.get_submodule(projection)
            if isinstance(layer, ExpertsLora):
                tuner._replace_module(merged, projection, layer.base_layer, layer)

    with _unmerged(model):
        reference = take_reference(tuner, adapter_names, calibration)
        missed = merge_while_running(model, experts, adapter_names, calibration, unwrap, progressbar)
    if missed:
        warnings.warn(
            f"The tokens of the calibration didn't reach {len(missed)} layers of experts, {missed[0]} first; "
            "they are rounded to the nearest value.",
            RuntimeWarning,
            stacklevel=3,
        )
    return reference
