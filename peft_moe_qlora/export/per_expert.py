"""Adapters with one LoRA per expert and projection, as experts were linear layers before they were fused.

Keys are those of the base's checkpoint, with `lora_A.weight` and `lora_B.weight` in place of `weight`. Gate and up
projection have the same A. Readers want one rank, plain scaling, all experts and all projections, so factors are
padded with zeros, scalings that differ are multiplied into B, and what wasn't trained gets zeros.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import pad
from transformers import AutoConfig

from ..experts import ExpertsLayout
from ..loading.load import class_of
from ..loading.save_bnb import key_of_tensor, keys_of_parts
from ..targets import expert_layouts
from .adapter_file import A_SUFFIX, B_SUFFIX, PREFIX, AdapterFile, ExpertFactors, linear_rank_and_alpha


def write_per_expert(adapter: AdapterFile, directory: str | Path, base: str | Path | None = None) -> None:
    """Writes an adapter for readers that know experts as linear layers.

    Args:
        adapter: one of this package.
        directory: created if it isn't there.
        base: directory of the base model, of which the config is read. Default: what the adapter's config names.

    Raises:
        ValueError: the base's config is not there, or doesn't have the adapter's experts; or the adapter has biases or
            modules trained in full, which these readers don't know.
    """
    base = base or adapter.config.base_model_name_or_path
    if not base or not Path(base, "config.json").is_file():
        raise ValueError(
            f"What experts are called in the base's checkpoint follows from its config.json, which is not in {base}. "
            "Name the directory of the base model."
        )
    strange = [key for key in adapter.others if not key.endswith((A_SUFFIX, B_SUFFIX))]
    if strange or adapter.config.bias != "none":
        raise ValueError(
            f"The adapter has {strange[0] if strange else 'biases'}, which readers of LoRA don't know. Merge it."
        )
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = class_of(config)._from_config(config)
    layouts = expert_layouts(model)
    of_module: dict[str, dict[str, ExpertFactors]] = defaultdict(dict)
    for factors in adapter.experts:
        if factors.path not in layouts:
            raise ValueError(
                f"{base} has no experts {factors.path}, for which the adapter has factors of {factors.name}."
            )
        of_module[factors.path][factors.projection] = factors
    linear = {key.removesuffix(A_SUFFIX) for key in adapter.others if key.endswith(A_SUFFIX)}
    scalings = [factors.scaling for factors in adapter.experts] + [_linear_scaling(adapter, name) for name in linear]
    scaling = scalings[0] if all(math.isclose(one, scalings[0]) for one in scalings) else 1.0
    ranks = [factors.r for factors in adapter.experts] + [adapter.others[name + A_SUFFIX].shape[0] for name in linear]
    rank = max(ranks)

    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, A: torch.Tensor, B: torch.Tensor, own_scaling: float) -> None:
        missing = rank - A.shape[0]
        if not math.isclose(own_scaling, scaling):
            B = (B.float() * (own_scaling / scaling)).to(B.dtype)
        tensors[f"{PREFIX}{name}{A_SUFFIX}"] = pad(A, (0, 0, 0, missing)).contiguous().clone()
        tensors[f"{PREFIX}{name}{B_SUFFIX}"] = pad(B, (0, missing)).contiguous().clone()

    for path, projections in of_module.items():
        layout = layouts[path]
        for projection in layout.projections:
            in_features, out_features = layout.features(projection)
            factors = projections.get(projection)
            if factors is None:
                A, B = (
                    adapter.experts[0].A.new_zeros(layout.num_experts, 1, in_features),
                    adapter.experts[0].A.new_zeros(layout.num_experts, out_features, 1),
                )
                own_scaling = scaling
            else:
                A, B, own_scaling = factors.A, factors.B, factors.scaling
                if A.shape != (layout.num_experts, factors.r, in_features) or B.shape[1] != out_features:
                    raise ValueError(
                        f"{factors.name} has factors {list(A.shape)} and {list(B.shape)}, but {base} has "
                        f"{layout.num_experts} experts with {in_features} features in and {out_features} out."
                    )
            names = _names(model, f"{path}.{projection}", layout)
            parts = _parts(B, projection, layout)
            for number, name in enumerate(names):
                expert, part = divmod(number, len(parts))
                add(name, A[expert], parts[part][expert], own_scaling)
    for name in sorted(linear):
        A, B = adapter.others[name + A_SUFFIX], adapter.others[name + B_SUFFIX]
        add(_name_of_linear(model, name), A, B, _linear_scaling(adapter, name))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    targets = sorted({key.removesuffix(A_SUFFIX).rpartition(".")[2] for key in tensors if key.endswith(A_SUFFIX)})
    LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,
        target_modules=targets,
        base_model_name_or_path=adapter.config.base_model_name_or_path,
        task_type=adapter.config.task_type,
        inference_mode=True,
    ).save_pretrained(directory)


def _linear_scaling(adapter: AdapterFile, name: str) -> float:
    return adapter.config.scaling(*linear_rank_and_alpha(adapter.config, name))


def _name_of_linear(model: nn.Module, name: str) -> str:
    """What a linear layer is called in the checkpoint.

    Raises:
        ValueError: its weight is a part of another tensor there, or made of several.
    """
    key = key_of_tensor(model, f"{name}.weight")
    if key is None:
        raise ValueError(
            f"{name} is no layer of its own in the base's checkpoint, so that its factors have no name there. Merge "
            "the adapter, or leave the layer out of it."
        )
    return key.removesuffix(".weight")


def _names(model: nn.Module, name: str, layout: ExpertsLayout) -> list[str]:
    """What the parts of a stack are called in the checkpoint, expert by expert, gate before up."""
    path, _, projection = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    keys = keys_of_parts(model, name, layout.num_experts, len(parts))
    if isinstance(keys, str):  # fused there: the names that such readers expect
        return [f"{path}.{expert}.{part}" for expert in range(layout.num_experts) for part in parts]
    return [key.removesuffix(".weight") for key in keys]


def _parts(B: torch.Tensor, projection: str, layout: ExpertsLayout) -> list[torch.Tensor]:
    """`(E, out, r)` of gate and up apart, or of the projection."""
    if projection != "gate_up_proj":
        return [B]
    return list(B.chunk(2, dim=1)) if layout.is_concatenated else [B[:, ::2], B[:, 1::2]]
