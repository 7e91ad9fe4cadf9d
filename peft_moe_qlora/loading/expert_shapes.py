"""The shapes of a model's experts modules, read from its config only."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..experts import ExpertsLayout
from ..targets import expert_layouts
from .load import class_of, read_config
from .paths import refuse_missing

NAMES_OF_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_experts_per_token")


def top_k_of(config: PreTrainedConfig) -> int | None:
    """K, the number of experts per token; None if the config has it under an unknown name."""
    text = config.get_text_config(decoder=True)
    return next((getattr(text, name) for name in NAMES_OF_TOP_K if isinstance(getattr(text, name, None), int)), None)


def read_expert_shapes(model: str | Path) -> tuple[list[ExpertsLayout], int | None]:
    """The distinct layouts of a model's experts modules, and K.

    Args:
        model: directory of a checkpoint, or a name on the hub. Only the config is read.

    Raises:
        CheckpointError: see `read_config`.
        OSError: there is no config.
        ValueError: the model has no routed experts, or see `refuse_missing`.
    """
    refuse_missing(model)
    config = read_config(model) if Path(model).is_dir() else AutoConfig.from_pretrained(str(model))
    with torch.device("meta"):
        found = class_of(config)._from_config(config)
    layouts = list(dict.fromkeys(expert_layouts(found).values()))
    if not layouts:
        raise ValueError(f"{model}: {type(found).__name__} has no routed experts.")
    return layouts, top_k_of(config)
