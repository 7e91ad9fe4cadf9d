"""Interface of layouts of quantized weights: which tensors of a checkpoint belong together, and how to read them."""

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
"""The quantization of one group of weights as declared in a checkpoint's config, including its `quant_method`."""


def quant_method(declared: dict[str, Any]) -> str:
    """`quant_method` in a checkpoint's `quantization_config`; old versions of bitsandbytes did not write it."""
    default = "bitsandbytes" if declared.keys() & {"load_in_4bit", "load_in_8bit"} else "a method without a name"
    method = declared.get("quant_method") or default
    return str(method.value if isinstance(method, QuantizationMethod) else method)


def weight_schemes(declared: dict[str, Any]) -> list[Scheme]:
    """The schemes declared in a `quantization_config`.

    compressed-tensors has one per group of layers, other methods have one for all layers.
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
        key: key of the weight in a 16-bit checkpoint.
        tensors: suffix of the key -> tensor; the suffix is empty for the tensor with the key of the weight.
    """

    key: str
    tensors: dict[str, TensorInfo]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(info.key for info in self.tensors.values())


@dataclass(frozen=True)
class PackedTensor(ABC):
    """One quantized weight of a checkpoint, whose headers have been checked.

    Args:
        key: key of the weight in a 16-bit checkpoint.
        shape: shape of the weight: a matrix, or one matrix per expert.
        storage: storage format to which its tensors are converted without loss.
        keys: keys of all its tensors.
    """

    key: str
    shape: tuple[int, ...]
    storage: Format
    keys: tuple[str, ...]

    is_out_in: ClassVar[bool] = True
    """Whether the weight is always stored `(out, in)`; otherwise in the orientation of the class."""

    can_be_requantized: ClassVar[bool] = True
    """Whether the weight can be requantized to another storage."""

    @property
    def num_parts(self) -> int:
        """Number of matrices stacked along the rows in one matrix."""
        return 1

    @property
    def description(self) -> str:
        """Description of the storage, for reports."""
        return f"{self.storage}, {'one tensor per expert' if len(self.shape) == 2 else 'fused'}"

    @abstractmethod
    def read(self, checkpoint: Checkpoint, expert: int | None = None) -> dict[str, torch.Tensor]:
        """Reads the tensors of the storage format, on the CPU.

        Args:
            checkpoint: the checkpoint.
            expert: index of the expert, if the weight has one matrix per expert.

        Raises:
            CheckpointError: a value is invalid.
        """

    def write(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inverse of `read` for one matrix: key -> tensor as in the file, without the dimension of experts.

        Args:
            tensors: tensors of the storage format, on the CPU.

        Raises:
            CheckpointError: the layout cannot store these tensors, or writing it is not supported.
        """
        raise CheckpointError(
            f"{self.key}: writing merged weights in the layout of this checkpoint is not supported. Merge into 16 "
            "bits, or in memory."
        )

    def read_each(self, checkpoint: Checkpoint) -> Iterator[dict[str, torch.Tensor]]:
        """Calls `read` for all experts, one after the other."""
        return (self.read(checkpoint, expert) for expert in range(self.shape[0]))


class DiskLayout(ABC):
    """A layout of quantized weights in checkpoints.

    Args:
        schemes: the schemes in the checkpoint's config that this layout supports.
    """

    must_be_declared: ClassVar[bool] = True
    """Whether the config of a checkpoint must declare this layout."""

    endings: ClassVar[dict[str, str]]
    """Ending of a key -> ending of the key of the weight; the first ending that matches is used."""

    describing: ClassVar[tuple[str, ...]]
    """The endings of tensors that are required to decode a weight, such as scales."""

    def __init__(self, schemes: list[Scheme]) -> None:
        self.schemes = schemes

    @classmethod
    @abstractmethod
    def reads(cls, scheme: Scheme) -> bool:
        """Whether weights with this scheme have this layout."""

    def plain_key(self, key: str) -> tuple[str, str]:
        """The key of the weight in a 16-bit checkpoint, and the ending of the given key; empty for none."""
        for ending, plain in self.endings.items():
            if key.endswith(ending):
                return key.removesuffix(ending) + plain, ending
        return key, ""

    @abstractmethod
    def codes_of(self, group: Group) -> str | None:
        """The key of a group's codes; None if the group is not a weight in this layout."""

    @abstractmethod
    def packed_tensor(self, checkpoint: Checkpoint, group: Group, parts: int = 1) -> PackedTensor:
        """Describes a weight, and checks from the headers that its tensors are complete and consistent.

        Args:
            checkpoint: the checkpoint.
            group: tensors of the weight.
            parts: number of matrices stacked along the rows in one matrix, such as gate and up projection.

        Raises:
            CheckpointError: a tensor is missing, has another shape or dtype, or metadata that is not supported.
        """
