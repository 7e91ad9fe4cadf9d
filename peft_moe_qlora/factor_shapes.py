"""Checks that the tensors of an adapter file match the model, before any of them is used."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from .config import rank_and_alpha

if TYPE_CHECKING:
    from .config import MoeQLoraConfig
    from .experts import ExpertsLayout

_FACTOR_KEY = re.compile(r".*\.(gate_up|up|down)_proj\.lora_[AB]\.(.*\.)?weight")
_LORA_KEY = re.compile(r"(.*)\.lora_[AB]\.weight")
_OLD_KEY = re.compile(r"(.*\.)lora_((?:gate_up|up|down)_proj)_([AB])(\..*)?")
_PEFT_PREFIX = "base_model.model."
_REMEDY = "The adapter belongs to another base model, or the file is damaged. Load the base that it was trained on."


def check_stored_shapes(
    config: MoeQLoraConfig, layouts: Mapping[str, ExpertsLayout], targets: Collection[str]
) -> None:
    """Compares the shapes in the adapter file of a config, if there is one, with the experts of a model.

    Args:
        config: a config, read by `MoeQLoraConfig.from_pretrained` or not.
        layouts: path -> layout of every experts module.
        targets: paths of the projections to adapt.

    Raises:
        ValueError: a tensor is missing, has another shape, or matches no experts of the model.
    """
    if config.stored is None or not config.stored.belongs_to(config):
        return
    expected = {}
    for name in targets:
        path, _, projection = name.rpartition(".")
        r, _ = rank_and_alpha(config.of_experts(), name)
        in_features, out_features = layouts[path].features(projection)
        num_experts = layouts[path].num_experts
        expected[f"{name}.lora_A.weight"] = (num_experts, r, in_features)
        expected[f"{name}.lora_B.weight"] = (num_experts, out_features, r)
    found = {key.removeprefix(_PEFT_PREFIX): shape for key, shape in config.stored.shapes.items()}
    check_factor_shapes(found, expected)


def check_stored_layers(found: Iterable[str], adapted: Collection[str]) -> None:
    """Checks that every factor in an adapter file belongs to an adapted layer.

    Args:
        found: keys in the file.
        adapted: paths of all adapted layers.

    Raises:
        ValueError: a tensor matches no adapted layer; the error names the first.
    """
    for key in found:
        layer = _LORA_KEY.fullmatch(key.removeprefix(_PEFT_PREFIX))
        if layer is not None and layer[1] not in adapted:
            raise ValueError(f"The adapter's tensor {key} matches no adapted layer of the model. {_REMEDY}")


def check_factor_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the shapes of experts' factors; other tensors in `found` are ignored.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape, or has a key from before version 0.1.0; the
            error names the first.
    """
    for old in filter(None, map(_OLD_KEY.fullmatch, found)):
        raise ValueError(
            f"The adapter's tensor {old[0]} has a key from before version 0.1.0. Rename it in the file to "
            f"{old[1]}{old[2]}.lora_{old[3]}.weight, and all such keys accordingly. The tensors do not change."
        )
    for key, shape in expected.items():
        if key not in found:
            raise ValueError(f"The adapter has no tensor {key}. Expected one of shape {shape}. {_REMEDY}")
        if found[key] != shape:
            raise ValueError(f"{key} has shape {found[key]} in the adapter. Expected {shape}. {_REMEDY}")
    for key, shape in found.items():
        # linear layers may have the same names, but their factors are 2-D
        if key not in expected and len(shape) == 3 and _FACTOR_KEY.fullmatch(key):
            raise ValueError(
                f"The adapter's tensor {key} matches no adapted experts of the model. {_REMEDY} XLoraModel and other "
                "methods that combine adapters do not support experts."
            )
