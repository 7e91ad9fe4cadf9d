"""Weights quantized for serving: how tensors of a 16-bit checkpoint are written in layouts that engines read.

Each layout that can be written is an `EngineLayout`, in the file that reads it. Merging looks it up by name.
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
        shape: of the tensor.
        dtype: as the file has it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class EngineLayout(ABC):
    """How engines expect quantized weights, and which weights they expect quantized."""

    name: ClassVar[str]
    """By which it is asked for."""

    storage: ClassVar[Format]
    """What codes and scales are made by."""

    linear: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Last parts of the names of the linear layers that engines have in this storage. Those of one group become one
    layer there, so that all of them are stored so, or none."""

    whole_rows: ClassVar[int] = 128
    """Rows, counted from the first, at whose multiples no block is cut."""

    @abstractmethod
    def stored(self, key: str, rows: int, columns: int) -> dict[str, tuple[str, Stored]]:
        """What is written for a matrix `(out, in)`: name of a tensor of the format -> key and tensor of the file.

        Args:
            key: of the matrix in a checkpoint in 16 bits.
            rows: of the matrix.
            columns: likewise.
        """

    @abstractmethod
    def keys_of_stack(self, class_name: str, key: str, parts: int) -> list[str] | None:
        """The keys written for a stack that a 16-bit checkpoint has as one tensor.

        Args:
            class_name: of the experts.
            key: of the stack.
            parts: matrices stacked along the rows of one expert's, such as gate and up.

        Returns:
            One key for each part, with `{}` for the number of the expert; or a single one without, of all experts.
            None where it is unknown what engines read.
        """

    def takes_single_experts(self, class_name: str) -> bool:
        """Whether engines read experts of a class in this storage that the checkpoint has one by one."""
        return True

    @abstractmethod
    def why_not(self, rows: int, columns: int) -> str | None:
        """Why engines can't read a matrix of that size; None if they can."""

    def takes_linear(self, name: str, rows: int, columns: int) -> bool:
        """Whether engines read a linear layer of that size, by the last part of its name."""
        return self.why_not(rows, columns) is None

    @abstractmethod
    def config(self, kept: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of the checkpoint.

        Args:
            kept: modules whose weights stay as they are.
        """

    def encode(self, key: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Rounds a finite matrix `(out, in)` to the nearest: tensors of the file, and the values they encode, in fp32.

        Raises:
            ValueError: a weight is beyond the range of the format.
        """
        rows, columns = matrix.shape
        try:
            tensors = self.storage.quantize(matrix)
        except ValueError as error:
            raise ValueError(f"{key} can't be stored: {error}") from error
        found = {}
        for name, (stored_key, stored) in self.stored(key, rows, columns).items():
            found[stored_key] = tensors[name].contiguous().view(stored.dtype).view(stored.shape)
        with_expert = {name: tensor[None] for name, tensor in tensors.items()}
        return found, self.storage.dequantize(with_expert, rows, columns, torch.float32)[0]


ENGINE_LAYOUTS: dict[str, EngineLayout] = {}
"""By their names."""


def register_engine_layout(cls: type[EngineLayout]) -> type[EngineLayout]:
    """Class decorator: registers a layout for `engine_layout`."""
    ENGINE_LAYOUTS[cls.name] = cls()
    return cls


def engine_layout(name: str) -> EngineLayout:
    """The layout of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ENGINE_LAYOUTS:
        raise ValueError(f"{name!r:.200} is not a format for serving; choose one of {tuple(ENGINE_LAYOUTS)}.")
    return ENGINE_LAYOUTS[name]
