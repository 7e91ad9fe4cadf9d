"""Weights quantized for serving: how weights of a 16-bit checkpoint are written in layouts that engines read.

Each layout that can be written is an `EngineLayout`, defined in the file that reads it. Merging looks it up by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch

from ...quantization import Format


class Stored(NamedTuple):
    """One tensor of a file.

    Args:
        shape: shape of the tensor.
        dtype: dtype in the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class EngineLayout(ABC):
    """How engines expect quantized weights, and which weights they expect quantized."""

    name: ClassVar[str]
    """Name for `engine_layout`."""

    storage: ClassVar[Format]
    """Storage format of codes and scales."""

    linear: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Last parts of the names of the linear layers that engines support in this storage. Engines fuse the layers of a
    group, so either all of them or none are quantized."""

    whole_rows: ClassVar[int] = 128
    """A matrix can be split at any multiple of this number of rows without splitting a block."""

    @abstractmethod
    def stored(self, key: str, rows: int, columns: int) -> dict[str, tuple[str, Stored]]:
        """The tensors written for a matrix `(out, in)`: name of a tensor of the format -> key and tensor in the file.

        Args:
            key: key of the matrix in a 16-bit checkpoint.
            rows: number of rows of the matrix.
            columns: number of columns of the matrix.
        """

    @abstractmethod
    def keys_of_stack(self, class_name: str, key: str, parts: int) -> list[str] | None:
        """The keys written for a stack that is one tensor in a 16-bit checkpoint.

        Args:
            class_name: class of the experts module.
            key: key of the stack.
            parts: number of matrices stacked along the rows of an expert's matrix, such as gate and up.

        Returns:
            One key per part, with `{}` for the index of the expert; or a single key without `{}` for all experts. None
            if the names that engines expect are unknown.
        """

    def takes_single_experts(self, class_name: str) -> bool:
        """Whether engines support experts of a class in this storage if the checkpoint has one tensor per expert."""
        return True

    @abstractmethod
    def why_not(self, rows: int, columns: int) -> str | None:
        """Why engines do not support a matrix of this shape; None if they do."""

    def takes_linear(self, name: str, rows: int, columns: int) -> bool:
        """Whether engines support a linear layer of this shape, given the last part of its name."""
        return self.why_not(rows, columns) is None

    @abstractmethod
    def config(self, kept: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of the checkpoint.

        Args:
            kept: modules whose weights are not quantized.
        """

    def encode(self, key: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Quantizes a finite matrix `(out, in)`: returns the tensors of the file, and their dequantized fp32 values.

        Raises:
            ValueError: a weight is out of the range of the format.
        """
        rows, columns = matrix.shape
        try:
            tensors = self.storage.quantize(matrix)
        except ValueError as error:
            raise ValueError(f"{key} cannot be stored: {error}") from error
        found = {}
        for name, (stored_key, stored) in self.stored(key, rows, columns).items():
            found[stored_key] = tensors[name].contiguous().view(stored.dtype).view(stored.shape)
        with_expert = {name: tensor[None] for name, tensor in tensors.items()}
        return found, self.storage.dequantize(with_expert, rows, columns, torch.float32)[0]


ENGINE_LAYOUTS: dict[str, EngineLayout] = {}
"""Name -> layout."""


def register_engine_layout(cls: type[EngineLayout]) -> type[EngineLayout]:
    """Class decorator: registers a layout for `engine_layout`."""
    ENGINE_LAYOUTS[cls.name] = cls()
    return cls


def engine_layout(name: str) -> EngineLayout:
    """The layout with the given name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ENGINE_LAYOUTS:
        raise ValueError(f"{name!r:.200} is not a format for serving. Choose one of {tuple(ENGINE_LAYOUTS)}.")
    return ENGINE_LAYOUTS[name]
