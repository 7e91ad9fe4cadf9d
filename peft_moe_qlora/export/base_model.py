"""The base of an adapter as its config.json describes it: what experts it has, and what its checkpoint calls them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from ..experts import ExpertsLayout
from ..loading.load import class_of
from ..loading.save_bnb import key_of_tensor, keys_of_parts
from ..targets import expert_layouts, targeted_projections
from .adapter_file import AdapterFile

PARTS_OF_FUSED = ("gate_proj", "up_proj")
"""What readers of single experts call the halves of a stack that the checkpoint has fused."""


@dataclass(frozen=True)
class BaseModel:
    """A base model without its weights.

    Args:
        directory: of the checkpoint.
        model: on the meta device.
        layouts: path -> layout of every routed experts module.
    """

    directory: Path
    model: PreTrainedModel
    layouts: dict[str, ExpertsLayout]

    @staticmethod
    def is_at(directory: str | Path | None) -> bool:
        """Whether a directory has the config.json of a base."""
        return bool(directory) and Path(directory, "config.json").is_file()

    @classmethod
    def open(cls, directory: str | Path | None) -> BaseModel:
        """Builds the model that config.json names, without memory.

        Raises:
            ValueError: there is no config.json.
        """
        if not cls.is_at(directory):
            raise ValueError(
                f"What experts are called in the base's checkpoint follows from its config.json, which is not in "
                f"{directory}. Name the directory of the base model."
            )
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = class_of(config)._from_config(config)
        return cls(Path(directory), model, expert_layouts(model))

    @property
    def quantization(self) -> str | None:
        """By what the checkpoint is quantized, as its config says."""
        config = getattr(self.model.config, "quantization_config", None)
        if config is None:
            return None
        return config["quant_method"] if isinstance(config, dict) else config.quant_method

    def check_adapter(self, adapter: AdapterFile) -> None:
        """Makes sure that an adapter has just the factors that its config says, of this model's shapes.

        Raises:
            ValueError: names the stack that is not in the model, of another shape, or without factors.
        """
        found = set()
        for factors in adapter.experts:
            if factors.path not in self.layouts:
                raise ValueError(
                    f"{self.directory} has no experts {factors.path}, for which the adapter has factors of "
                    f"{factors.name}. Name the base that it was trained on."
                )
            layout = self.layouts[factors.path]
            if factors.projection not in layout.projections:
                raise ValueError(
                    f"The adapter has factors of {factors.name}, but {self.directory} has {layout.projections} there."
                )
            in_features, out_features = layout.features(factors.projection)
            num_experts = layout.num_experts
            if factors.A.shape != (num_experts, factors.r, in_features) or factors.B.shape[1] != out_features:
                raise ValueError(
                    f"{factors.name} has factors {list(factors.A.shape)} and {list(factors.B.shape)}, but "
                    f"{self.directory} has {num_experts} experts with {in_features} features in and {out_features} "
                    "out."
                )
            found.add(factors.name)
        for path, layout in self.layouts.items():
            for projection in targeted_projections(adapter.config, path, layout):
                if f"{path}.{projection}" not in found:
                    raise ValueError(
                        f"By its config the adapter adapts {path}.{projection}, but its file has no factors of it; it "
                        "is damaged, or incomplete."
                    )

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

    def name_of_linear(self, name: str) -> str:
        """What a linear layer is called in the checkpoint.

        Raises:
            ValueError: its weight is a part of another tensor there, or made of several.
        """
        key = key_of_tensor(self.model, f"{name}.weight")
        if key is None:
            raise ValueError(
                f"{name} is no layer of its own in the base's checkpoint, so that its factors have no name there. "
                "Merge the adapter, or leave the layer out of it."
            )
        return key.removesuffix(".weight")
