"""The base of an adapter as its config.json describes it: what experts it has, and what its checkpoint calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..experts import ExpertsLayout
from ..loading.load import class_of, quantization_of, read_config
from ..loading.quantization_config import QUANT_METHOD, quant_method
from ..loading.save_bnb import key_of_tensor, keys_of_parts
from ..targets import expert_layouts, parents

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""What a model on the hub may be called."""

PARTS_OF_FUSED = ("gate_proj", "up_proj")
"""What readers of single experts call the halves of a stack that the checkpoint has fused."""


@dataclass(frozen=True)
class BaseModel:
    """A base model without its weights.

    Args:
        directory: of the checkpoint.
        config: of the checkpoint.
        model: on the meta device.
        layouts: path -> layout of every routed experts module.
    """

    directory: Path
    config: PreTrainedConfig
    model: PreTrainedModel
    layouts: dict[str, ExpertsLayout]

    @staticmethod
    def is_at(directory: str | Path | None) -> bool:
        """Whether a directory has the config.json of a base."""
        return bool(directory) and Path(directory, "config.json").is_file()

    @classmethod
    def open(cls, base: str | Path | None, names: Iterable[str] = (), revision: str | None = None) -> BaseModel:
        """Builds the model that config.json names, without memory.

        Args:
            base: a directory, or a name on the hub, of which config.json is downloaded.
            names: of tensors of an adapter. Where they are of experts that only the text model by itself has under
                such names, it is that one: `AutoModelForCausalLM` makes it of a checkpoint that has towers too, of
                Qwen3.5 and Llama 4 for example.
            revision: of a model on the hub.

        Raises:
            ValueError: there is no config.json.
            CheckpointError: see `read_config`.
        """
        directory = Path(base) if cls.is_at(base) else _downloaded(base, revision)
        config = read_config(directory)
        with torch.device("meta"):
            model = class_of(config)._from_config(config)
            found = cls(directory, config, model, expert_layouts(model))
            names = list(names)
            classes = AutoModelForCausalLM._model_mapping
            if not names or found._has_layers_of(names) or type(config) not in classes:
                return found
            model = AutoModelForCausalLM.from_config(config)
            text = cls(directory, config, model, expert_layouts(model))
        return text if text._has_layers_of(names) else found

    def _has_layers_of(self, names: list[str]) -> bool:
        """Whether names of LoRA's tensors, or of stacks, are all of this model's layers."""
        paths = tuple(f"{path}." for path in self.layouts)
        others = {name.partition(".lora_")[0] for name in names if not name.startswith(paths) and ".lora_" in name}
        has_experts = any(name.startswith(paths) for name in names)
        return has_experts and all(self.layer(name) is not None for name in others)

    @property
    def is_text_only(self) -> bool:
        """Whether the checkpoint has more than this model, which then has its layers under other names."""
        return type(self.model) is not class_of(self.config)

    @property
    def model_class(self) -> type:
        """Whose `from_pretrained` makes this model of the checkpoint."""
        return AutoModelForCausalLM if self.is_text_only else class_of(self.config)

    @property
    def quantization(self) -> str | None:
        """By what the checkpoint is quantized, as its config says."""
        found = quantization_of(self.config)
        return None if found is None else quant_method(found)

    @property
    def is_of_others(self) -> bool:
        """Whether the checkpoint is quantized by others than bitsandbytes and this package."""
        return self.quantization not in (None, "bitsandbytes", QUANT_METHOD)

    def names_of_experts(self, path: str, projection: str) -> list[str]:
        """What the parts of a stack are called in the checkpoint, expert by expert, gate before up, without `.weight`.

        Where the checkpoint has a stack in one tensor, the names that readers of single experts expect.
        """
        parts = PARTS_OF_FUSED if projection == "gate_up_proj" else (projection,)
        num_experts = self.layouts[path].num_experts
        keys = keys_of_parts(self.model, f"{path}.{projection}", num_experts, len(parts))
        if isinstance(keys, str):
            return [f"{path}.{expert}.{part}" for expert in range(num_experts) for part in parts]
        return [key.removesuffix(".weight") for key in keys]

    def name_of_linear(self, name: str) -> str | None:
        """What a linear layer is called in the checkpoint; None if its weight is no tensor of its own there."""
        key = key_of_tensor(self.model, f"{name}.weight")
        return None if key is None else key.removesuffix(".weight")

    def layer(self, name: str) -> nn.Linear | nn.Embedding | None:
        """The linear layer or embedding of that name; None if there is none, or it is a part of experts."""
        if any(parent in self.layouts for parent in parents(name)):
            return None
        try:
            layer = self.model.get_submodule(name)
        except AttributeError:
            return None
        return layer if isinstance(layer, (nn.Linear, nn.Embedding)) else None

    def layers(self) -> list[str]:
        """The names of all linear layers and embeddings that are no part of experts."""
        return [name for name, _ in self.model.named_modules() if self.layer(name) is not None]

    def shape_of(self, key: str) -> tuple[int, ...] | None:
        """Shape of a parameter or buffer of that name; None if there is none."""
        tensor = self.model.state_dict().get(key)
        return None if tensor is None else tuple(tensor.shape)


def revision_of_base(config: Mapping[str, Any], base: str | Path | None) -> str | None:
    """The revision of the base that an adapter remembers; None if there is none, or another base is named.

    Args:
        config: options of the adapter, as its config.json has them.
        base: directory of a model, or its name on the hub. None for what the adapter names.
    """
    is_own = base is None or str(base) == config.get("base_model_name_or_path")
    revision = config.get("revision")
    return revision if is_own and isinstance(revision, str) else None


def _downloaded(base: str | Path | None, revision: str | None) -> Path:
    """Where the config.json of a model on the hub lies.

    Raises:
        ValueError: there is no such model, or no way to the hub.
    """
    if not base:
        raise ValueError(
            "The adapter doesn't name its base, whose config.json says what experts are called in its checkpoint. "
            "Name the directory of the base model (--base)."
        )
    message = (
        f"What experts are called in the base's checkpoint follows from its config.json, which is not in {base}. Name "
        "the directory of the base model."
    )
    if Path(base).exists() or not HUB_NAME.fullmatch(str(base)):
        raise ValueError(message)
    try:
        return Path(cached_file(str(base), "config.json", revision=revision)).parent
    except OSError as error:
        raise ValueError(f"{message} As a name on the hub: {error}") from error
