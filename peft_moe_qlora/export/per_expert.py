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
from torch.nn.functional import pad

from ..experts import ExpertsLayout
from .adapter_file import A_SUFFIX, B_SUFFIX, PREFIX, AdapterFile, ExpertFactors, linear_scaling
from .base_model import BaseModel


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
    found = BaseModel.open(base or adapter.config.base_model_name_or_path)
    strange = [key for key in adapter.others if not key.endswith((A_SUFFIX, B_SUFFIX))]
    if strange or adapter.config.bias != "none":
        raise ValueError(
            f"The adapter has {strange[0] if strange else 'biases'}, which readers of LoRA don't know. Merge it."
        )
    of_module: dict[str, dict[str, ExpertFactors]] = defaultdict(dict)
    for factors in adapter.experts:
        found.layout(factors.path, factors.name)
        of_module[factors.path][factors.projection] = factors
    linear = {key.removesuffix(A_SUFFIX) for key in adapter.others if key.endswith(A_SUFFIX)}
    scalings = [factors.scaling for factors in adapter.experts] + [
        linear_scaling(adapter.config, name) for name in linear
    ]
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
        layout = found.layouts[path]
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
                        f"{factors.name} has factors {list(A.shape)} and {list(B.shape)}, but {found.directory} has "
                        f"{layout.num_experts} experts with {in_features} features in and {out_features} out."
                    )
            names = found.names_of_experts(path, projection)
            parts = _parts(B, projection, layout)
            for number, name in enumerate(names):
                expert, part = divmod(number, len(parts))
                add(name, A[expert], parts[part][expert], own_scaling)
    for name in sorted(linear):
        A, B = adapter.others[name + A_SUFFIX], adapter.others[name + B_SUFFIX]
        add(found.name_of_linear(name), A, B, linear_scaling(adapter.config, name))
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


def _parts(B: torch.Tensor, projection: str, layout: ExpertsLayout) -> list[torch.Tensor]:
    """`(E, out, r)` of gate and up apart, or of the projection."""
    if projection != "gate_up_proj":
        return [B]
    return list(B.chunk(2, dim=1)) if layout.is_concatenated else [B[:, ::2], B[:, 1::2]]
