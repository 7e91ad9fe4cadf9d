"""A saved adapter as plain data: the factors of experts, and everything else as PEFT names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..config import MoeQLoraConfig, rank_and_alpha
from ..experts import ExpertsLayout

PREFIX = "base_model.model."


@dataclass(frozen=True)
class ExpertFactors:
    """What an adapter adds to one stack: `scaling * B[e] @ A[e]`.

    Args:
        path: of the experts module.
        projection: name of the stack.
        A: `(E, r, in)`.
        B: `(E, out, r)`.
        scaling: of the product.
        alpha: that gives the scaling at this rank.
    """

    path: str
    projection: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    alpha: float

    @property
    def r(self) -> int:
        return self.A.shape[1]

    @property
    def name(self) -> str:
        return f"{self.path}.{self.projection}"

    def zeros_for(self, path: str, projection: str, layout: ExpertsLayout) -> ExpertFactors:
        """Factors of the same rank and scaling for another stack, which change nothing."""
        in_features, out_features = layout.features(projection)
        A = self.A.new_zeros(layout.num_experts, self.r, in_features)
        B = self.A.new_zeros(layout.num_experts, out_features, self.r)
        return replace(self, path=path, projection=projection, A=A, B=B)


@dataclass(frozen=True)
class AdapterFile:
    """A saved adapter.

    Args:
        config: as saved.
        experts: the factors of all adapted stacks; of one module, those of its first projection first.
        non_expert: key without PEFT's prefix -> tensor, of linear layers and whatever else was saved.
    """

    config: MoeQLoraConfig
    experts: tuple[ExpertFactors, ...]
    non_expert: dict[str, torch.Tensor]

    @property
    def stacks(self) -> list[str]:
        """The names of all that have factors."""
        return [factors.name for factors in self.experts]


def linear_scaling(config: MoeQLoraConfig, name: str) -> float:
    """The factor of `B @ A` of a linear layer."""
    return config.scaling(*rank_and_alpha(config, name))


@dataclass
class InMemory:
    """Takes the place of a directory, for an adapter that is handed over and not written.

    Args:
        tensors: of the file.
        config: of the other file.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    config: LoraConfig | None = None


def save_tensors(directory: Path | InMemory, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes an adapter's tensors as PEFT's.

    Args:
        directory: created if it isn't there.
        tensors: key without PEFT's prefix -> tensor.
    """
    # clones, since parts of one tensor share memory, which safetensors refuses
    tensors = {PREFIX + key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    if isinstance(directory, InMemory):
        directory.tensors = tensors
        return
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})


def save_config(directory: Path | InMemory, config: LoraConfig) -> None:
    """Writes an adapter's config as PEFT's."""
    if isinstance(directory, InMemory):
        directory.config = config
    else:
        config.save_pretrained(directory)
