"""A saved adapter as plain data: the factors of experts, and all other tensors under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..config import MoeQLoraConfig, rank_and_alpha
from ..experts import ExpertsLayout
from ..progress import PATIENCE, announce_file

PREFIX = "base_model.model."


@dataclass(frozen=True)
class ExpertFactors:
    """The LoRA factors of one stack, whose delta is `scaling * B[e] @ A[e]`.

    Args:
        path: path of the experts module.
        projection: name of the stack.
        A: `(E, r, in)`.
        B: `(E, out, r)`.
        scaling: scaling of the product.
        alpha: the alpha that results in this scaling at this rank.
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
        """Returns zero factors of the same rank and scaling for another stack."""
        in_features, out_features = layout.features(projection)
        A = self.A.new_zeros(layout.num_experts, self.r, in_features)
        B = self.A.new_zeros(layout.num_experts, out_features, self.r)
        return replace(self, path=path, projection=projection, A=A, B=B)


@dataclass(frozen=True)
class AdapterFile:
    """A saved adapter.

    Args:
        config: the config as saved.
        experts: the factors of all adapted stacks. Within a module, those of its first projection come first.
        non_expert: key without PEFT's prefix -> tensor, for linear layers and all other saved tensors.
    """

    config: MoeQLoraConfig
    experts: tuple[ExpertFactors, ...]
    non_expert: dict[str, torch.Tensor]

    @property
    def stacks(self) -> list[str]:
        """The names of all stacks that have factors."""
        return [factors.name for factors in self.experts]


def linear_scaling(config: MoeQLoraConfig, name: str) -> float:
    """The scaling of `B @ A` for a linear layer."""
    return config.scaling(*rank_and_alpha(config, name))


@dataclass
class InMemory:
    """Replaces the output directory for an adapter that is passed on in memory.

    Args:
        tensors: contents of the safetensors file.
        config: contents of adapter_config.json.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    config: LoraConfig | None = None


def save_tensors(directory: Path | InMemory, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes an adapter's tensors as PEFT does.

    Args:
        directory: output directory; created if it does not exist.
        tensors: key without PEFT's prefix -> tensor.
    """
    # cloned because safetensors rejects views that share memory
    items = tqdm(tensors.items(), desc="Copying factors", unit="tensor", delay=PATIENCE)
    tensors = {PREFIX + key: tensor.contiguous().clone() for key, tensor in items}
    if isinstance(directory, InMemory):
        directory.tensors = tensors
        return
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / SAFETENSORS_WEIGHTS_NAME
    announce_file(file, sum(tensor.nbytes for tensor in tensors.values()))
    save_file(tensors, file, {"format": "pt"})


def save_config(directory: Path | InMemory, config: LoraConfig) -> None:
    """Writes an adapter's config as PEFT does."""
    if isinstance(directory, InMemory):
        directory.config = config
    else:
        config.save_pretrained(directory)
