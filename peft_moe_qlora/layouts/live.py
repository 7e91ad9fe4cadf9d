"""The adapter of a model in memory in an engine's layout, without files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from ..config import MoeQLoraConfig
from ..sharded import refuse_sharded
from .adapter_file import PREFIX, AdapterFile, InMemory
from .base_model import BaseModel, revision_of_base
from .engines import LLAMA_CPP, SGLANG, VLLM, write_for_engine
from .native import taken_apart

_ENGINES = {"vllm": VLLM, "sglang": SGLANG, "llama.cpp": LLAMA_CPP}
"""Engines that read PEFT's two files."""


def adapter_for_engine(
    model: PeftModel, engine: str = "vllm", adapter_name: str = "default", base: str | Path | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the tensors and the config that `convert_adapter` would write for the saved adapter.

    Args:
        model: the model with the adapter.
        engine: `"vllm"`, `"sglang"` or `"llama.cpp"`; see `convert_adapter`.
        adapter_name: name of the adapter.
        base: directory of the base model that the engine serves, whose config.json is read, or its name on the hub.
            Default: the base that the adapter names.

    Returns:
        Key -> tensor, copies on the adapter's device; and the options as JSON values.

    Raises:
        ValueError: the engine is unknown or reads other files, there is no such adapter, parameters are sharded, or
            see `write_for_engine`.
    """
    if engine not in _ENGINES:
        raise ValueError(f"engine={engine!r} is not supported here. Choose one of {tuple(_ENGINES)}.")
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, MoeQLoraConfig):
        found = (
            f"its config is a {type(config).__name__}. Expected a MoeQLoraConfig"
            if config
            else f"the model has no such adapter. Choose one of {sorted(model.peft_config)}"
        )
        raise ValueError(f"The adapter {adapter_name!r} cannot be exported: {found}.")
    refuse_sharded(model, "exporting the adapter")
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {key.removeprefix(PREFIX): tensor.detach() for key, tensor in saved.items()}
    named = config.base_model_name_or_path or model.base_model.model.name_or_path
    experts, non_expert = taken_apart(Path(f"the adapter {adapter_name}"), config, tensors)
    adapter = AdapterFile(config, tuple(experts), non_expert)
    opened = BaseModel.open(base or named, tensors, revision_of_base(vars(config), base))
    out = InMemory()
    write_for_engine(_ENGINES[engine], adapter, out, opened)
    options = {name: sorted(one) if isinstance(one, set) else one for name, one in out.config.to_dict().items()}
    return out.tensors, json.loads(json.dumps(options))
