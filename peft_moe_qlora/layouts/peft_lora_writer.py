"""Adapters as PEFT's own LoRA on fused parameters (`target_parameters`) has them, from 0.19.1 on.

`PATH.base_layer.lora_A.weight` and `lora_B` belong to the first projection, those without `base_layer` to the second;
a module with one adapted projection has no `base_layer`. A is `(E * r, in)`, experts slowest; B is `(out, r * E)`,
experts fastest. Layout: `peft.tuners.lora.layer.ParamWrapper`, peft 0.19.1 to 0.21.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..config import rank_and_alpha
from .adapter_file import PREFIX, AdapterFile, ExpertFactors
from .base_model import BaseModel
from .non_expert import A_SUFFIX, B_SUFFIX, EMBEDDING_A, EMBEDDING_B, adapted_layers

_KEPT_OPTIONS = (
    "base_model_name_or_path",
    "lora_alpha",
    "modules_to_save",
    "r",
    "revision",
    "task_type",
    "use_rslora",
)
_OLD_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""As the end of a target module PEFT takes these for experts, dense layers' and shared experts' too."""


def write_peft_lora(adapter: AdapterFile, directory: Path, base: BaseModel | None) -> None:
    """Writes an adapter that stock `PeftModel.from_pretrained` loads, without this package.

    Ranks and alphas that differ between layers are kept as patterns, so that no factor is changed.

    Args:
        adapter: one of this package.
        directory: created if it isn't there.
        base: the model that it belongs to; only needed where the layout depends on it.

    Raises:
        ValueError: the adapter has what PEFT's LoRA on parameters can't have, or a layer that PEFT doesn't adapt in
            this model, or the base is needed and not there.
    """
    if adapter.config.bias != "none":
        raise ValueError(
            f"The adapter was trained with bias={adapter.config.bias!r}, which LoRA on parameters can't have. Merge "
            "it instead."
        )
    _check_others(adapter)
    of_module: dict[str, list[ExpertFactors]] = defaultdict(list)
    for factors in adapter.experts:
        of_module[factors.path].append(factors)
    tensors = {PREFIX + _name_for_peft(key, adapter, base): tensor for key, tensor in adapter.others.items()}
    for path, projections in of_module.items():
        is_mistaken = _is_mistaken(path, adapter, base)
        for depth, factors in enumerate(reversed(projections)):
            segment = ".base_layer" * depth
            A, B = factors.A, factors.B
            if is_mistaken:
                A, B = B.transpose(1, 2), A.transpose(1, 2)
            num_experts, r, in_features = A.shape
            A = A.reshape(num_experts * r, in_features)
            B = B.permute(1, 2, 0).reshape(B.shape[1], r * num_experts)
            tensors[f"{PREFIX}{path}{segment}.lora_A.weight"] = A.contiguous()
            tensors[f"{PREFIX}{path}{segment}.lora_B.weight"] = B.contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    _config(adapter).save_pretrained(directory)


def _config(adapter: AdapterFile) -> LoraConfig:
    config = adapter.config
    linear = sorted(adapted_layers(adapter.others))
    as_parameters = [f"{name}.weight" for name in linear if name.rpartition(".")[2] in _OLD_NAMES]
    settled = {factors.name: (factors.r, factors.alpha) for factors in adapter.experts}
    parameters = [*settled, *as_parameters]
    settled |= {name: rank_and_alpha(config, name.removesuffix(".weight")) for name in (*linear, *as_parameters)}
    # names instead of the patterns: of patterns the first counts that matches, and PEFT sorts them when it saves
    ranks = {name: r for name, (r, _) in settled.items() if r != config.r}
    alphas = {name: alpha for name, (_, alpha) in settled.items() if alpha != config.lora_alpha}
    return LoraConfig(
        **{option: getattr(config, option) for option in _KEPT_OPTIONS},
        target_modules=[name for name in linear if f"{name}.weight" not in as_parameters],
        target_parameters=parameters,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        inference_mode=True,
    )


def _check_others(adapter: AdapterFile) -> None:
    """Refuses what would be written, but not loaded."""
    saved = adapter.config.modules_to_save or ()
    for key in adapter.others:
        is_of_lora = key.endswith((A_SUFFIX, B_SUFFIX, EMBEDDING_A, EMBEDDING_B))
        if not is_of_lora and not any(f"{name}." in key for name in saved):
            raise ValueError(f"The adapter has {key}, which LoRA on parameters has no place for. Merge it instead.")


def _is_mistaken(path: str, adapter: AdapterFile, base: BaseModel | None) -> bool:
    """Whether PEFT takes the stacks of an experts module for (out, in), though they are (in, out).

    It does where the class declares nothing, which is Llama 4's.
    """
    return path.endswith("feed_forward.experts") and _model_type(path, "Llama 4", adapter, base).startswith("llama4")


def _name_for_peft(key: str, adapter: AdapterFile, base: BaseModel | None) -> str:
    """The key of a linear layer's factor from which PEFT finds the layer.

    PEFT renames keys as transformers renames those of checkpoints, where `mlp.shared_expert.` of Laguna is a pattern
    that matches the `mlp.shared_experts` of the model too, and spoils it.
    """
    if ".mlp.shared_experts." in key and _model_type(key, "Laguna", adapter, base) == "laguna":
        return key.replace(".mlp.shared_experts.", ".mlp.shared_expert.")
    return key


def _model_type(name: str, candidate: str, adapter: AdapterFile, base: BaseModel | None) -> str:
    if base is None and adapter.config.base is not None:
        return adapter.config.base["model_type"]
    if base is None:
        raise ValueError(
            f"{name} may be of {candidate}, which PEFT treats otherwise. Name the directory of the base model "
            f"(the adapter's own, {adapter.config.base_model_name_or_path}, is not here)."
        )
    return base.model.config.model_type
