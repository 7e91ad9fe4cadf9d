"""Interface of storage formats with fewer than 16 bits: tensors, values and rounding.

Each format is defined and registered in one file in `formats`. Loading, training and merging use this interface only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from typing import ClassVar, NamedTuple

import torch

Tensors = Mapping[str, torch.Tensor]
"""Name -> tensor: the stored tensors of one matrix, or of several with a leading dimension."""


class Spec(NamedTuple):
    """Shape and dtype of a stored tensor. Dtypes are integers: floating-point tensors would be cast with the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(ABC):
    """A storage format: codes, which represent values, and scales, which blocks of weights share.

    Subclasses are frozen dataclasses; equal instances store weights identically. A matrix is `(rows, columns)`. In
    some formats, a block spans several rows. For these, the rows of a matrix that consists of several matrices, such
    as gate and up projection, are divided into `parts` of equal size, and no block spans two parts.
    """

    example: ClassVar[str] = ""
    """A valid name of the format, for errors."""

    is_out_in: ClassVar[bool] = False
    """Whether matrices are always stored `(out, in)`, even if the class is transposed: blocks run along the inputs."""

    kernel_codes: ClassVar[str | None] = None
    """Name of the code type in the kernels; None if the kernels do not support the format, and torch decodes it."""

    @abstractmethod
    def __str__(self) -> str:
        """The short name of the format, which `from_text` parses."""

    @classmethod
    @abstractmethod
    def from_text(cls, text: str) -> Format | None:
        """Inverse of `str`; None if the text names another format."""

    @abstractmethod
    def tensors(self, rows: int, columns: int, parts: int = 1) -> dict[str, Spec]:
        """Name -> spec of the stored tensors of one matrix, under the names used in checkpoints; the codes first."""

    def check_shape(self, rows: int, columns: int, parts: int = 1) -> None:
        """Checks that a matrix can be stored.

        Raises:
            ValueError: the format does not support the shape.
        """
        return

    @abstractmethod
    def quantize(self, matrix: torch.Tensor, parts: int = 1) -> dict[str, torch.Tensor]:
        """Quantizes a finite matrix; each weight is rounded to the nearest value of its block."""

    @abstractmethod
    def dequantize(
        self, tensors: Tensors, rows: int, columns: int, dtype: torch.dtype, parts: int = 1
    ) -> torch.Tensor:
        """`(E, rows, columns)` weights of `(E, ...)` tensors: products in fp32, rounded once to `dtype`."""

    def requantize(self, matrix: torch.Tensor, before: Tensors, parts: int = 1) -> dict[str, torch.Tensor]:
        """Quantizes a finite matrix after a delta was added; each weight is rounded to the nearest value of its block.

        Args:
            matrix: the new weights.
            before: name -> stored tensors of the matrix before the delta was added.
            parts: number of parts of the matrix.
        """
        return self.quantize(matrix, parts)

    def matrices_at_a_time(self, rows: int, columns: int) -> int:
        """Largest number of matrices for one call of `dequantize`."""
        return 2**30

    def why_not_joined(self, rows: int, columns: int) -> str | None:
        """Why the tensors of two matrices can't be concatenated along the rows; None if they can."""
        return None

    # used by kernels

    scale_kind: ClassVar[str] = "fp32"
    """Data type whose bits the second tensor stores; fp32 for scales with two levels."""

    second_level: ClassVar[str] = ""
    """How two-level scales are decoded, if there are more than two tensors. "map": the second tensor contains indices
    into a table of values, which are multiplied by the third tensor (one number per 256) and added to the fourth.
    "times", "over": the second tensor contains FP8 numbers, which are multiplied or divided by the third tensor (one
    number per part)."""

    codes_per_byte: ClassVar[int] = 2
    """Number of codes per byte of the first tensor."""

    flat_blocksize: ClassVar[int | None] = None
    """Number of weights that share a scale, if blocks are runs of the flattened matrix."""

    def tile_block(self, rows: int, columns: int, parts: int = 1) -> tuple[int, int] | None:
        """Rows and columns that share a scale; the number of columns is a power of two of at least 16.

        Scales then form a grid of `(block row, block column)`, part after part along the rows. None if the scales are
        arranged otherwise; the kernels then decode whole matrices first.
        """
        return None

    # used by rounding

    @abstractmethod
    def blocks(self, matrix: torch.Tensor, parts: int = 1) -> torch.Tensor:
        """`(num_blocks, weights of a block)`: the weights that share a scale; incomplete blocks are zero-padded."""

    @abstractmethod
    def scales(self, tensors: Tensors) -> torch.Tensor:
        """`(E, num_blocks)` fp32 scales of `(E, ...)` tensors, in the order of `blocks`."""

    @abstractmethod
    def scale_of_weights(self, scales: torch.Tensor, rows: int, columns: int, parts: int = 1) -> torch.Tensor:
        """`(rows, columns)`: `(num_blocks,)` scales expanded to one per weight."""

    @abstractmethod
    def candidates(self, largest: torch.Tensor, before: torch.Tensor) -> Iterable[torch.Tensor]:
        """`(num_blocks,)` candidate scales for requantizing a matrix; if errors are equal, the first is chosen.

        Args:
            largest: largest magnitude of each block.
            before: previous scales of the matrix.
        """

    @abstractmethod
    def nearest(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The uint8 codes whose values, times the scales, are nearest, in the shape of the weights."""

    @abstractmethod
    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The fp32 values of uint8 codes."""

    @abstractmethod
    def store_codes(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Packs `(rows, columns)` codes, one per byte, into the stored tensor."""

    @abstractmethod
    def store_scales(self, scales: torch.Tensor, rows: int, columns: int, parts: int = 1) -> dict[str, torch.Tensor]:
        """Converts `(num_blocks,)` fp32 scales to the stored tensors, which may round them."""

    def store_scales_anew(
        self, scales: torch.Tensor, before: Tensors, rows: int, columns: int, parts: int = 1
    ) -> dict[str, torch.Tensor]:
        """Like `store_scales`, for a matrix that is requantized: scales of a second level may stay unchanged.

        Args:
            scales: the new scales.
            before: name -> stored tensors of the matrix before.
            rows: number of rows of the matrix.
            columns: number of columns of the matrix.
            parts: number of parts of the matrix.
        """
        return self.store_scales(scales, rows, columns, parts)


_FORMATS: list[type[Format]] = []


def register_format(cls: type[Format]) -> type[Format]:
    """Class decorator: registers a format for `parse_format`."""
    if cls not in _FORMATS:
        _FORMATS.append(cls)
    return cls


def registered_formats() -> tuple[type[Format], ...]:
    """All formats, in the order of registration."""
    return tuple(_FORMATS)


@cache
def parse_format(text: str) -> Format:
    """The format with a given name, such as `"nf4/64"`.

    Raises:
        ValueError: the name is unknown, or has an invalid part.
    """
    for cls in _FORMATS:
        found = cls.from_text(text)
        if found is not None:
            return found
    raise ValueError(f"{text!r} is not a storage format. Expected a name such as {_examples()}.")


def _examples() -> str:
    return ", ".join(repr(cls.example) for cls in _FORMATS if cls.example)
