"""Known models by name, and the sizes of a model given as a checkpoint, a config.json, or a known name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ...quantization import parse_format
from ..disk import PACKS_ALL_EXPERTS
from ..finder import stack_targets
from ..load import quantization_of
from .opened import OpenedCheckpoint, empty_model
from .sizes import DTYPE, ModelSizes, sizes_of

_FILE = Path(__file__).with_name("known_models.json")


@cache
def known_models() -> Mapping[str, dict[str, Any]]:
    """Name on the hub -> sizes, `model_type` and, for a quantized model, `quantization_config` of its config.json."""
    return MappingProxyType(json.loads(_FILE.read_text(encoding="utf-8")))


def read_sizes(model: str | Path) -> tuple[str, ModelSizes]:
    """The path or name to load the model from, and its sizes. No weights are read.

    Args:
        model: directory of a checkpoint, a config.json, a directory with only a config.json, or a name of
            `known_models`, case-insensitive, with or without its organization.

    Raises:
        CheckpointError: see `OpenedCheckpoint.open`.
        ValueError: `model` is none of these, has no routed experts, or is a quantized config.json that does not
            determine which weights are packed.
    """
    path = Path(model)
    if path.is_dir() and (any(path.glob("*.safetensors")) or not (path / "config.json").is_file()):
        return str(model), OpenedCheckpoint.open(path).sizes()
    if path.exists():
        return str(path.parent if path.is_file() else path), _sizes_of_config(AutoConfig.from_pretrained(path), path)
    name = _find(str(model))
    values = dict(known_models()[name])
    return name, _sizes_of_config(AutoConfig.for_model(values.pop("model_type"), **values), name)


def _find(model: str) -> str:
    names = {spelling: name for name in known_models() for spelling in (name.lower(), name.lower().split("/")[1])}
    if model.lower() in names:
        return names[model.lower()]
    close = list(dict.fromkeys(names[one] for one in get_close_matches(model.lower(), names, n=6, cutoff=0.5)))
    like = f"Similar known names: {', '.join(close)}" if close else f"Known names: {', '.join(known_models())}"
    raise ValueError(
        f"{model} is not a checkpoint directory, a config.json, or the name of a known model. {like}. For another "
        "model, download its config.json, and pass the path of the file."
    )


def _sizes_of_config(config: PreTrainedConfig, place: str | Path) -> ModelSizes:
    """Sizes of a config's model. All weights are assumed to be in 16 bits, except the MXFP4 experts of gpt-oss."""
    found = quantization_of(config)
    model = empty_model(config)
    if found is None:
        return sizes_of(model)
    if found.get("quant_method") not in PACKS_ALL_EXPERTS:
        raise ValueError(
            f"{place} declares quant_method={found.get('quant_method')!r}, which does not determine the packed "
            "weights. Pass the directory of the checkpoint, or a config.json without quantization_config to estimate "
            "the model with requantized experts."
        )
    storage = parse_format(PACKS_ALL_EXPERTS[found["quant_method"]])
    stored = {target.name: target.empty_stack_as_declared(storage, DTYPE).nbytes for target in stack_targets(model)}
    return sizes_of(model, stored, may_repack=True, packed_as=storage)
