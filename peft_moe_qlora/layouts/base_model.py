"""The base model of an adapter as config.json describes it: its experts, and their names in the checkpoint."""

from __future__ import annotations

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
from ..loading.paths import is_hub_name
from ..loading.quantization_config import QUANT_METHOD, quant_method
from ..loading.save_bnb import key_of_tensor, keys_of_parts
from ..targets import expert_layouts, parents

PARTS_OF_FUSED = ("gate_proj", "up_proj")
"""Names that per-expert readers use for the halves of a stack that is fused in the checkpoint."""


@dataclass(frozen=True)
class BaseModel:
    """A base model without its weights.

    Args:
        directory: directory of the checkpoint.
        config: config of the checkpoint.
        model: the model on the meta device.
        layouts: path -> layout of every routed experts module.
    """

    directory: Path
    config: PreTrainedConfig
    model: PreTrainedModel
    layouts: dict[str, ExpertsLayout]

    @staticmethod
    def is_at(directory: str | Path | None) -> bool:
        """Whether a directory contains the config.json of a base model."""
        return bool(directory) and Path(directory, "config.json").is_file()

    @classmethod
    def open(cls, base: str | Path | None, names: Iterable[str] = (), revision: str | None = None) -> BaseModel:
        """Builds the model that config.json describes on the meta device.

        Args:
            base: a directory, or a name on the hub, from which config.json is downloaded.
            names: names of an adapter's tensors. If only the text model has experts under these names, the text model
                is built: `AutoModelForCausalLM` loads it from multimodal checkpoints, such as Qwen3.5 and Llama 4.
            revision: revision of a model on the hub.

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
        """Whether all given names of LoRA tensors or of stacks belong to layers of this model."""
        paths = tuple(f"{path}." for path in self.layouts)
        others = {name.partition(".lora_")[0] for name in names if not name.startswith(paths) and ".lora_" in name}
        has_experts = any(name.startswith(paths) for name in names)
        return has_experts and all(self.layer(name) is not None for name in others)

    @property
    def is_text_only(self) -> bool:
        """Whether this is the text model of a multimodal checkpoint, which uses other layer names."""
        return type(self.model) is not class_of(self.config)

    @property
    def model_class(self) -> type:
        """The class whose `from_pretrained` loads this model from the checkpoint."""
        return AutoModelForCausalLM if self.is_text_only else class_of(self.config)

    @property
    def quantization(self) -> str | None:
        """Quantization method of the checkpoint according to its config; None if it is not quantized."""
        found = quantization_of(self.config)
        return None if found is None else quant_method(found)

    @property
    def is_of_others(self) -> bool:
        """Whether the checkpoint is quantized by a tool other than bitsandbytes and this package."""
        return self.quantization not in (None, "bitsandbytes", QUANT_METHOD)

    def names_of_experts(self, path: str, projection: str) -> list[str]:
        """Names of a stack's parts in the checkpoint, expert by expert, gate before up, without `.weight`.

        If the checkpoint stores the stack as one tensor, the names that per-expert readers expect.
        """
        parts = PARTS_OF_FUSED if projection == "gate_up_proj" else (projection,)
        num_experts = self.layouts[path].num_experts
        keys = keys_of_parts(self.model, f"{path}.{projection}", num_experts, len(parts))
        if isinstance(keys, str):
            return [f"{path}.{expert}.{part}" for expert in range(num_experts) for part in parts]
        return [key.removesuffix(".weight") for key in keys]

    def name_of_linear(self, name: str) -> str | None:
        """Name of a linear layer in the checkpoint; None if its weight is not a separate tensor there."""
        key = key_of_tensor(self.model, f"{name}.weight")
        return None if key is None else key.removesuffix(".weight")

    def layer(self, name: str) -> nn.Linear | nn.Embedding | None:
        """The linear layer or embedding with this name; None if there is none, or if it belongs to experts."""
        if any(parent in self.layouts for parent in parents(name)):
            return None
        try:
            layer = self.model.get_submodule(name)
        except AttributeError:
            return None
        return layer if isinstance(layer, (nn.Linear, nn.Embedding)) else None

    def layers(self) -> list[str]:
        """The names of all linear layers and embeddings outside of experts."""
        return [name for name, _ in self.model.named_modules() if self.layer(name) is not None]

    def shape_of(self, key: str) -> tuple[int, ...] | None:
        """Shape of the parameter or buffer with this name; None if there is none."""
        tensor = self.model.state_dict().get(key)
        return None if tensor is None else tuple(tensor.shape)


def revision_of_base(config: Mapping[str, Any], base: str | Path | None) -> str | None:
    """The revision of the base that an adapter's config names; None if it names none or another base is given.

    Args:
        config: options of the adapter's config file.
        base: directory of a model, or its name on the hub. None for the base that the adapter names.
    """
    is_own = base is None or str(base) == config.get("base_model_name_or_path")
    revision = config.get("revision")
    return revision if is_own and isinstance(revision, str) else None


def _downloaded(base: str | Path | None, revision: str | None) -> Path:
    """Directory of the downloaded config.json of a model on the hub.

    Raises:
        ValueError: the model does not exist, or the hub cannot be reached.
    """
    if not base:
        raise ValueError(
            "The adapter's config does not name its base model, whose config.json is required for the names of the "
            "experts. Pass the directory of the base model as base (--base)."
        )
    message = (
        f"The config.json of the base model {base} was not found, but is required for the names of the experts. Pass "
        "the directory of the base model as base (--base)."
    )
    if Path(base).exists() or not is_hub_name(base):
        raise ValueError(message)
    try:
        return Path(cached_file(str(base), "config.json", revision=revision)).parent
    except OSError as error:
        raise ValueError(f"{message} Reading it from the hub failed: {error}") from error
