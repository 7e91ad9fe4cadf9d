"""Merging adapters into a model in memory: what is refused, and the experts' part of it. Linear layers are PEFT's."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from ..experts import QuantizedExperts
from ..layer import ExpertsLora
from ..loading import cast_as_loaded, restore_experts
from ..targets import UNTIE
from .calibration import adapted_projections, config_with_vocabulary, merge_while_running, random_token_ids
from .check import Reference, take_reference

ROUNDINGS = ("second-order", "nearest")


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
        if isinstance(layer, ExpertsLora) or not isinstance(layer, LoraLayer):
            continue  # two stacks that are tied are merged into two
        if not any(name in layer.scaling for name in adapter_names):
            continue
        # PEFT's layer on nn.MultiheadAttention has several weights, none of them tied
        weight = getattr(layer.get_base_layer(), "weight", None)
        others = [holder for holder in holders.get(weight, ()) if holder != path]
        if others:
            raise ValueError(
                f"The adapter changes {path} alone, but {others[0]} has the same weight and would change too. {UNTIE}"
            )


@contextmanager
def restored_on_error(layers: Sequence[ExpertsLora]) -> Iterator[None]:
    """Gives experts back what they had merged when the context began, if a `ValueError` ends it."""
    merged_before = {layer: list(layer.merged_adapters) for layer in layers}
    try:
        yield
    except ValueError:
        for layer, names in merged_before.items():
            if layer.merged_adapters != names:
                layer.unmerge()
                layer.merge(adapter_names=names)
        raise


def merge_densely(tuner: LoraModel, adapter_names: Sequence[str], dtype: torch.dtype, progressbar: bool) -> None:
    """Gives the classes' own experts modules back, merged, in a floating dtype.

    Args:
        tuner: whose layers on experts are taken away.
        adapter_names: what to merge.
        dtype: of the experts.
        progressbar: show one.
    """
    layers = [(path, layer) for path, layer in tuner.model.named_modules() if isinstance(layer, ExpertsLora)]
    for path, layer in tqdm(layers, desc="Merging experts", disable=not progressbar):
        parent, _, name = path.rpartition(".")
        tuner._replace_module(tuner.model.get_submodule(parent), name, layer.merged_dense(dtype, adapter_names), layer)
    restore_experts(tuner.model, dtype)
    if dtype == torch.float32:
        cast_as_loaded(tuner.model, dtype)  # before deltas of linear layers are added, which 16 bits would round


def merge_for_inputs(
    tuner: LoraModel, adapter_names: list[str] | None, calibration: torch.Tensor | None, progressbar: bool
) -> tuple[Reference | None, list[str] | None]:
    """Merges the quantized experts that adapters reach, rounded for their inputs, and takes their layers away.

    Args:
        tuner: whose layers are merged.
        adapter_names: what to merge. Default: the active adapters.
        calibration: `(N, L)` token ids. Default: `random_token_ids`.
        progressbar: show one.

    Returns:
        What the model gave before the merge, None if there are no such experts; and the adapters to be merged into
        the other layers, with those that were merged before.
    """
    model = tuner.model
    tuner_layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    merged_before = [name for layer in tuner_layers for name in layer.merged_adapters]
    asked_for = tuner.active_adapters if adapter_names is None else adapter_names
    names = list(dict.fromkeys([*merged_before, *asked_for]))
    experts = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantizedExperts) and not module.is_dense and adapted_projections(module, names)
    }
    if not experts:
        return None, adapter_names
    if calibration is None:
        config = config_with_vocabulary(model)
        if config is None:
            raise ValueError(
                f"{type(model).__name__} has no config that tells its vocabulary. Pass token ids as calibration, or "
                "rounding='nearest'."
            )
        calibration = random_token_ids(config)
    for layer in tuner_layers:
        if layer.merged:
            layer.unmerge()
    reference = take_reference(tuner, names, calibration)

    def unwrap(merged: QuantizedExperts) -> None:
        # each at once: should the forward fail later, what is merged is not merged again
        for projection in merged.layout.projections:
            layer = merged.get_submodule(projection)
            if isinstance(layer, ExpertsLora):
                tuner._replace_module(merged, projection, layer.base_layer, layer)

    missed = merge_while_running(model, experts, names, calibration, unwrap, progressbar)
    if missed:
        warnings.warn(
            f"The tokens of the calibration didn't reach {len(missed)} layers of experts, {missed[0]} first; "
            "they are rounded to the nearest value.",
            RuntimeWarning,
            stacklevel=3,
        )
    return reference, names
