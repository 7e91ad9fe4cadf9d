"""What a layout of quantized weights in a checkpoint says: which tensors belong together, and how they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.utils.quantization_config import QuantizationMethod

from ...quantization import Format
from ..checkpoint import Checkpoint, CheckpointError, TensorInfo

Scheme = dict[str, Any]
"""How one kind of weights is quantized, as the config of a checkpoint has it, its `quant_method` included."""


def quant_method(declared: dict[str, Any]) -> str:
    """By what a checkpoint is quantized, as its `quantization_config` says; bitsandbytes did not always say it."""
    default = "bitsandbytes" if declared.keys() & {"load_in_4bit", "load_in_8bit"} else "a method without a name"
    method = declared.get("quant_method") or default
    return str(method.value if isinstance(method, QuantizationMethod) else method)


def weight_schemes(declared: dict[str, Any]) -> list[Scheme]:
    """One for each kind of weights that a `quantization_config` declares.

    compressed-tensors has groups of layers, each with its own; others have one for all.
    """
    method = quant_method(declared)
    groups = declared.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, dict):
        return [{**declared, "quant_method": method}]
    found = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            return []
        found.append({**weights, "quant_method": method, "format": group.get("format") or declared.get("format")})
    return found


@dataclass(frozen=True)
class Group:
    """The tensors of a checkpoint that may be one quantized weight.

    Args:
        key: that the weight would have in a 16-bit checkpoint.
        tensors: by the suffix of their key; the suffix is empty for the tensor that has the weight's own key.
    """

    key: str
    tensors: dict[str, TensorInfo]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(info.key for info in self.tensors.values())


@dataclass(frozen=True)
class PackedTensor(ABC):
    """One quantized weight of a checkpoint, its headers checked.

    Args:
        key: that the weight would have in a 16-bit checkpoint.
        shape: of the weight: a matrix, or one of each expert.
        storage: the format that its tensors become, without a bit changed.
        keys: of all its tensors.
    """

    key: str
    shape: tuple[int, ...]
    storage: Format
    keys: tuple[str, ...]

    is_out_in: ClassVar[bool] = True
    """Whether it is stored `(out, in)` whatever the class has; otherwise as the class has it."""

    can_be_requantized: ClassVar[bool] = True
    """Whether another storage may be asked for, into which it is decoded."""

    @property
    def num_parts(self) -> int:
        """Matrices under each other that one is made of."""
        return 1

    @property
    def description(self) -> str:
        """How the weight is stored, for people."""
        return f"{self.storage}, {'one tensor per expert' if len(self.shape) == 2 else 'fused'}"

    @abstractmethod
    def read(self, checkpoint: Checkpoint, expert: int | None = None) -> dict[str, torch.Tensor]:
        """The format's tensors, on the CPU.

        Args:
            checkpoint: where the keys are.
            expert: which one, where the weight is one of each expert.

        Raises:
            CheckpointError: a value is none that a quantizer writes.
        """

    def write(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `read` gives of one matrix, as it lies in the file: key -> tensor, without experts in front.

        Args:
            tensors: of the format, on the CPU.

        Raises:
            CheckpointError: the layout has no place for them, or none is known of it.
        """
        raise CheckpointError(
            f"{self.key} is stored in a layout that merged weights are not written in. Merge into 16 bits, or in "
            "memory."
        )

    def read_each(self, checkpoint: Checkpoint) -> Iterator[dict[str, torch.Tensor]]:
        """`read` for all experts, one after the other."""
        return (self.read(checkpoint, expert) for expert in range(self.shape[0]))


class DiskLayout(ABC):
    """A way in which quantized weights lie in checkpoints.

    Args:
        schemes: what the checkpoint declares that this layout reads.
    """

    must_be_declared: ClassVar[bool] = True
    """Whether the config of a checkpoint has to say that weights are in this layout."""

    endings: ClassVar[dict[str, str]]
    """Ending of a key -> what stands there in the key of the weight; of several that fit the first counts."""

    describing: ClassVar[tuple[str, ...]]
    """The endings of tensors without which the weight means nothing, such as scales."""

    def __init__(self, schemes: list[Scheme]) -> None:
        self.schemes = schemes

    @classmethod
    @abstractmethod
    def reads(cls, scheme: Scheme) -> bool:
        """Whether weights that are declared so are in this layout."""

    def plain_key(self, key: str) -> tuple[str, str]:
        """The key that the weight would have in a 16-bit checkpoint, and the ending of this one; empty for none."""
        for ending, plain in self.endings.items():
            if key.endswith(ending):
                return key.removesuffix(ending) + plain, ending
        return key, ""

    @abstractmethod
    def codes_of(self, group: Group) -> str | None:
        """The key of a group's codes; None if it is no weight in this layout."""

    @abstractmethod
    def packed_tensor(self, checkpoint: Checkpoint, group: Group, parts: int = 1) -> PackedTensor:
        """Describes a weight, and makes sure from the headers that all its parts are there and fit each other.

        Args:
            checkpoint: where the tensors are.
            group: of the weight.
            parts: matrices under each other that one is made of, such as gate and up projection.

        Raises:
            CheckpointError: a part is missing, of another shape or dtype, or described in an unknown way.
        """
