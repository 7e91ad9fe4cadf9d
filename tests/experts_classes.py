"""Every experts class of the installed transformers, found in its source, and tiny instances of it."""

from __future__ import annotations

import ast
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.models
from torch import nn
from transformers import PreTrainedConfig

DECORATOR = "use_experts_implementation"

# names of the sizes in configs
NAMES_OF_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts")
NAMES_OF_HIDDEN = ("hidden_size", "moe_hidden_size")
NAMES_OF_INTERMEDIATE = ("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size")


@dataclass(frozen=True)
class Sizes:
    """E, H and I of an experts module."""

    num_experts: int = 5
    hidden: int = 24
    intermediate: int = 16


DEFAULT_SIZES = Sizes()


@dataclass(frozen=True)
class ExpertsClass:
    """An experts class, as parsed from its source.

    Args:
        model: the folder of transformers.models.
        name: the class.
        is_decorated: whether it declares its layout.
        config_attributes: config attributes that its constructor reads; empty if it takes sizes instead.
    """

    model: str
    name: str
    is_decorated: bool
    config_attributes: frozenset[str]

    def load(self) -> type[nn.Module]:
        return getattr(self._module("modeling"), self.name)

    def load_config_class(self) -> type[PreTrainedConfig]:
        """The first config class of the model that has all attributes that the constructor reads."""
        module = self._module("configuration")
        candidates = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, PreTrainedConfig) and value.__module__ == module.__name__
        ]
        fitting = [config_class for config_class in candidates if self.config_attributes <= _attributes(config_class)]
        assert fitting, f"no config class in {module.__name__} has {sorted(self.config_attributes)}"
        return fitting[0]

    def _module(self, kind: str) -> Any:
        return importlib.import_module(f"transformers.models.{self.model}.{kind}_{self.model}")


def _attributes(config_class: type[PreTrainedConfig]) -> set[str]:
    # an instance may raise if values differ by layer
    fields = getattr(config_class, "__dataclass_fields__", {})
    return {*dir(config_class), *fields, *config_class.attribute_map}


def find_experts_classes() -> list[ExpertsClass]:
    """All classes decorated as experts, and all others that hold weights and have "Experts" in their name."""
    found = []
    folder = Path(transformers.models.__file__).parent
    for file in sorted(folder.glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        if not re.search(r"^class \w*Expert", source, re.MULTILINE):
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and "Expert" in node.name:
                is_decorated = any(DECORATOR in ast.unparse(decorator) for decorator in node.decorator_list)
                if is_decorated or "nn.Parameter(" in ast.unparse(node):
                    found.append(ExpertsClass(file.parent.name, node.name, is_decorated, _config_attributes(node)))
    return found


def _config_attributes(node: ast.ClassDef) -> frozenset[str]:
    return frozenset(
        attribute.attr
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
        for attribute in ast.walk(function)
        if isinstance(attribute, ast.Attribute) and isinstance(attribute.value, ast.Name)
        if attribute.value.id == "config"
    )


class TinyConfig:
    """A model's own default config, with some values replaced."""

    def __init__(self, config: PreTrainedConfig, **overrides: Any) -> None:
        self.__dict__.update(overrides, config=config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["config"], name)


def tiny_config(experts_class: ExpertsClass, sizes: Sizes) -> TinyConfig:
    """The default values of everything except sizes."""
    overrides = {
        **dict.fromkeys(NAMES_OF_NUM_EXPERTS, sizes.num_experts),
        **dict.fromkeys(NAMES_OF_HIDDEN, sizes.hidden),
        **dict.fromkeys(NAMES_OF_INTERMEDIATE, sizes.intermediate),
    }
    return TinyConfig(experts_class.load_config_class()(), **overrides, _experts_implementation="eager")


@torch.no_grad()
def build(experts_class: ExpertsClass, sizes: Sizes = DEFAULT_SIZES, seed: int = 0) -> nn.Module:
    """A tiny fp32 instance with random weights, the same at every call.

    For inputs of variance 1 the output of the first projection is large enough for every clamp and softcap to matter.
    """
    if experts_class.config_attributes:
        experts = experts_class.load()(tiny_config(experts_class, sizes))
    else:
        experts = experts_class.load()(sizes.num_experts, sizes.hidden, sizes.intermediate)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in experts.named_parameters():
        if name.startswith("down_proj"):
            std = sizes.intermediate**-0.5
        elif parameter.dim() == 3:
            std = 6 * sizes.hidden**-0.5
        else:
            std = 0.5
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return experts
