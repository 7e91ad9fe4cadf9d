"""The layout of this package's own adapters, which `docs/adapter-file.md` describes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..base_identity import BaseIdentity
from ..config import MoeQLoraConfig, rank_and_alpha
from ..factor_shapes import check_stored_shapes
from ..options import REMEDY, check_saved, names_of, values_of
from ..targets import is_all_linear, reached_stacks, resolve_targets
from .adapter_file import AdapterFile, ExpertFactors, save_tensors
from .base_model import BaseModel
from .check_non_expert import check_non_expert, check_targeted
from .non_expert import adapted_layers, factor_pairs, name_in_model

_FACTOR = re.compile(r"(?P<path>.*)\.(?P<projection>gate_up_proj|up_proj|down_proj)\.lora_(?P<factor>[AB])\.weight")


# null has a meaning or is the default; saved configs list their targets explicitly
_CAN_BE_NULL = {field.name for field in fields(MoeQLoraConfig) if field.default is None} - {"target_modules"}
_CAN_BE_NULL |= {"quant_type"}


def check_own_options(file: Path, options: Mapping[str, Any]) -> None:
    """Like `check_saved`, for a config of this package."""
    check_saved(file, options, values_of("lora", "own"), names_of(is_needed=True), _CAN_BE_NULL)
    try:
        BaseIdentity.of(options.get("base"))
    except ValueError as error:
        raise ValueError(f"{file}: {error} {REMEDY}") from error


def read_own(directory: Path, tensors: dict[str, torch.Tensor], base: BaseModel | None) -> AdapterFile:
    """Reads an adapter of this package.

    Args:
        directory: directory that `PeftModel.save_pretrained` has written.
        tensors: contents of the tensor file, key without PEFT's prefix -> tensor.
        base: the adapter's base model, to check its tensors against; None if unknown.

    Raises:
        ValueError: the adapter lacks a tensor, or has shapes that do not fit each other or the base. The error names
            the file and the key.
    """
    config = MoeQLoraConfig.from_pretrained(str(directory))
    file = directory / SAFETENSORS_WEIGHTS_NAME
    experts, non_expert = taken_apart(file, config, tensors)
    reached = replace(config)
    if base is not None:
        resolve_targets(reached, base.model, base.layouts)
        _check_against(file, base, config, reached, experts, non_expert)
    check_non_expert(file, config, non_expert, base)
    linear = adapted_layers(non_expert)
    if not is_all_linear(reached):  # its layers are unknown without a base
        check_targeted(file, linear, lambda name: bool(check_target_module_exists(reached, name)))
    for pair in factor_pairs(non_expert):
        r, _ = rank_and_alpha(config, pair.name)
        if pair.A.shape[0] != r:
            raise ValueError(
                f"{file}: the factors of {pair.name} have rank {pair.A.shape[0]}, but the config, which determines "
                f"the scaling, has rank {r}. The file and the config belong to different adapters. Save the adapter "
                "again."
            )
    if not experts:
        raise ValueError(
            f"{file} contains no factors of experts. Use PEFT's own LoRA for an adapter of linear layers only."
        )
    return AdapterFile(config, tuple(experts), non_expert)


def taken_apart(
    file: Path, config: MoeQLoraConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[list[ExpertFactors], dict[str, torch.Tensor]]:
    """Splits the tensors of an adapter of this package into factors of experts and all others.

    Args:
        file: name of the file for errors.
        config: the adapter's config.
        tensors: key without PEFT's prefix -> tensor.

    Raises:
        ValueError: a factor is missing, or its rank differs from the config's.
    """
    factors: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    non_expert = {}
    for name, tensor in tensors.items():
        if name.endswith(".base_layer.weight"):
            continue  # PEFT's copy of a frozen embedding or head
        match = _FACTOR.fullmatch(name) if tensor.dim() == 3 else None
        if match is None:
            non_expert[name] = tensor
        else:
            factors.setdefault((match["path"], match["projection"]), {})[match["factor"]] = tensor
    experts = [_factors(file, config, *at, found) for at, found in factors.items()]
    # the first projection of a module is the one other than down_proj
    experts.sort(key=lambda one: (one.path, one.projection == "down_proj"))
    return experts, non_expert


def _factors(
    file: Path, config: MoeQLoraConfig, path: str, projection: str, found: dict[str, torch.Tensor]
) -> ExpertFactors:
    name = f"{path}.{projection}"
    r, alpha = rank_and_alpha(config.of_experts(), name)
    if found.keys() != {"A", "B"}:
        raise ValueError(
            f"{file} contains lora_{next(iter(found))} of {name} without its other factor. The file is damaged. Save "
            "the adapter again."
        )
    A, B = found["A"], found["B"]
    if A.shape[:2] != (B.shape[0], r) or B.shape[2] != r:
        raise ValueError(
            f"{file}: lora_A and lora_B of {name} have shapes {list(A.shape)} and {list(B.shape)}. Expected (E, r, "
            f"in) and (E, out, r) with rank {r}, which the config specifies."
        )
    return ExpertFactors(path, projection, A, B, config.scaling(r, alpha), alpha)


def _check_against(
    file: Path,
    base: BaseModel,
    config: MoeQLoraConfig,
    reached: MoeQLoraConfig,
    experts: list[ExpertFactors],
    non_expert: dict[str, torch.Tensor],
) -> None:
    """Rejects experts that the base lacks or has in other shapes, and a file that lacks a targeted layer.

    Args:
        file: name of the file for errors.
        base: the adapter's base model.
        config: the config as saved.
        reached: the config with its targets resolved for the base.
        experts: the factors of stacks.
        non_expert: key without PEFT's prefix -> tensor.
    """
    for factors in experts:
        if factors.path not in base.layouts:
            raise ValueError(
                f"{file} contains factors of {factors.name}, but {base.directory} has no experts module "
                f"{factors.path}. The adapter belongs to another base model. Use the adapter's own base model."
            )
    try:
        check_stored_shapes(config, base.layouts, reached_stacks(reached, base.layouts))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    found = adapted_layers(non_expert)
    missing = [name for name in base.layers() if check_target_module_exists(reached, name) and name not in found]
    if missing:
        raise ValueError(
            f"{file} contains no factors of {missing[0]}, which its config targets. The file is damaged. Save the "
            "adapter again."
        )
    _check_biases(file, base, config, {*found, *(factors.path for factors in experts)}, non_expert)


def _check_biases(
    file: Path, base: BaseModel, config: MoeQLoraConfig, adapted: set[str], non_expert: dict[str, torch.Tensor]
) -> None:
    """Rejects a file that lacks biases which its config trains: those of all modules, or of adapted ones."""
    if config.bias == "none":
        return
    biases = [name for name, _ in base.model.named_parameters() if name.endswith("bias")]
    wanted = [name for name in biases if config.bias == "all" or name.rpartition(".")[0] in adapted]
    found = {name_in_model(key) for key in non_expert}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{file} contains no tensor of {missing[0]}, which bias={config.bias!r} of its config trains. The file is "
            "damaged. Save the adapter again."
        )


def write_native(adapter: AdapterFile, directory: Path, base: BaseModel | None) -> None:
    """Writes an adapter that `PeftModel.from_pretrained` loads once this package is imported.

    Args:
        adapter: the adapter.
        directory: output directory; created if it does not exist.
        base: not used; all writers have the same signature.
    """
    tensors = dict(adapter.non_expert)
    for factors in adapter.experts:
        tensors |= {f"{factors.name}.lora_A.weight": factors.A, f"{factors.name}.lora_B.weight": factors.B}
    save_tensors(directory, tensors)
    adapter.config.save_pretrained(str(directory))
