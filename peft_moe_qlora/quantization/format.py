"""What a storage of fewer than 16 bits is: the one object that knows its bytes, its values and its rounding.

A format is one file in `formats`, registered there. Everything else, from loading to merging, asks it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from typing import ClassVar, NamedTuple

import torch

Tensors = Mapping[str, torch.Tensor]
"""Name -> tensor: what is stored of one matrix, or with a leading dimension of several."""


class Spec(NamedTuple):
    """Shape and dtype of a stored tensor. All are integers: floating ones would be cast with the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(ABC):
    """How matrices are stored: codes that stand for values, times scales that blocks of weights share.

    Subclasses are frozen dataclasses, equal where they store alike. A matrix is `(rows, columns)`. Some formats block
    rows too: the rows of a matrix that is several put under each other, such as gate and up projection, are `parts`
    of equal size, of which no block spans two.
    """

    example: ClassVar[str] = ""
    """A name of the format, for errors."""

    is_out_in: ClassVar[bool] = False
    """Whether matrices are stored `(out, in)`, whatever the class has: blocks then run along the inputs."""

    kernel_codes: ClassVar[str | None] = None
    """By which name the kernels know how to decode it; None where they don't, so that torch decodes."""

    @abstractmethod
    def __str__(self) -> str:
        """A short name that `from_text` reads."""

    @classmethod
    @abstractmethod
    def from_text(cls, text: str) -> Format | None:
        """Reads what `str` writes; None if it is of another format."""

    @abstractmethod
    def tensors(self, rows: int, columns: int, parts: int = 1) -> dict[str, Spec]:
        """What is stored of one matrix, by the names under which it is saved; the codes come first."""

    def check_shape(self, rows: int, columns: int, parts: int = 1) -> None:
        """Makes sure that a matrix can be stored.

        Raises:
            ValueError: it can't.
        """
        return

    @abstractmethod
    def quantize(self, matrix: torch.Tensor, parts: int = 1) -> dict[str, torch.Tensor]:
        """Stores a finite matrix, each weight as the nearest value that its block has."""

    @abstractmethod
    def dequantize(
        self, tensors: Tensors, rows: int, columns: int, dtype: torch.dtype, parts: int = 1
    ) -> torch.Tensor:
        """`(E, rows, columns)` weights of `(E, ...)` tensors: products in fp32, rounded once to `dtype`."""

    def requantize(self, matrix: torch.Tensor, before: Tensors, parts: int = 1) -> dict[str, torch.Tensor]:
        """Stores a finite matrix that a delta was added to, each weight as the nearest value that its block has.

        Args:
            matrix: the new weights.
            before: what was stored of the matrix, by the same names.
            parts: of the matrix.
        """
        return self.quantize(matrix, parts)

    def matrices_at_a_time(self, rows: int, columns: int) -> int:
        """How many matrices `dequantize` can be given."""
        return 2**30

    def why_not_joined(self, rows: int, columns: int) -> str | None:
        """What keeps the tensors of a matrix from being put before those of the one under it; None for nothing."""
        return None

    # what kernels go by

    scale_kind: ClassVar[str] = "fp32"
    """What the integers of the second tensor are the bits of; fp32 where scales take two steps to decode."""

    second_level: ClassVar[str] = ""
    """How scales of two steps are decoded, where there are more than two tensors. "map": the second tensor holds
    numbers of a map, times the third for each 256, plus the fourth. "times" and "over": it holds FP8, to be multiplied
    or divided by the third, which has one number for each part."""

    codes_per_byte: ClassVar[int] = 2
    """In the first tensor."""

    flat_blocksize: ClassVar[int | None] = None
    """Weights that share a scale, where blocks are runs of the flattened matrix."""

    def tile_block(self, rows: int, columns: int, parts: int = 1) -> tuple[int, int] | None:
        """Rows and columns that share a scale, the columns a power of two of at least 16.

        A scale then is at `(row of the block, column of the block)` of a grid, each part's rows behind those of the
        one before. None where it isn't so; the kernels then decode whole matrices first.
        """
        return None

    # what rounding is done by

    @abstractmethod
    def blocks(self, matrix: torch.Tensor, parts: int = 1) -> torch.Tensor:
        """`(num_blocks, weights of a block)`: the weights that share a scale, zeros where a block is cut short."""

    @abstractmethod
    def scales(self, tensors: Tensors) -> torch.Tensor:
        """`(E, num_blocks)` fp32 scales of `(E, ...)` tensors, in the order of `blocks`."""

    @abstractmethod
    def scale_of_weights(self, scales: torch.Tensor, rows: int, columns: int, parts: int = 1) -> torch.Tensor:
        """`(rows, columns)`: the scale of each weight, of `(num_blocks,)` scales."""

    @abstractmethod
    def candidates(self, largest: torch.Tensor, before: torch.Tensor) -> Iterable[torch.Tensor]:
        """`(num_blocks,)` scales to choose from when a matrix is rounded anew; of equal ones the first counts.

        Args:
            largest: magnitude in each block.
            before: scales that the matrix had.
        """

    @abstractmethod
    def nearest(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The codes whose values, times the scales, are nearest; uint8, in the shape of the weights."""

    @abstractmethod
    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The fp32 values that uint8 codes stand for."""

    @abstractmethod
    def store_codes(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """`(rows, columns)` codes, one to a byte, as they are stored."""

    @abstractmethod
    def store_scales(self, scales: torch.Tensor, rows: int, columns: int, parts: int = 1) -> dict[str, torch.Tensor]:
        """`(num_blocks,)` fp32 scales as they are stored, which may round them."""

    def store_scales_anew(
        self, scales: torch.Tensor, before: Tensors, rows: int, columns: int, parts: int = 1
    ) -> dict[str, torch.Tensor]:
        """The same for a matrix that is rounded anew: what the scales have in common may stay what it was.

        Args:
            scales: the new ones.
            before: what was stored of the matrix, by name.
            rows: of the matrix.
            columns: likewise.
            parts: likewise.
        """
        return self.store_scales(scales, rows, columns, parts)


_FORMATS: list[type[Format]] = []


def register_format(cls: type[Format]) -> type[Format]:
    """Lets `parse_format` find a format; a class decorator."""
    if cls not in _FORMATS:
        _FORMATS.append(cls)
    return cls


def registered_formats() -> tuple[type[Format], ...]:
    """All formats, in the order in which they were registered."""
    return tuple(_FORMATS)


@cache
def parse_format(text: str) -> Format:
    """The format that a name stands for, such as `"nf4/64"`.

    Raises:
        ValueError: it is none, or has a part that its format doesn't know.
    """
    for cls in _FORMATS:
        found = cls.from_text(text)
        if found is not None:
            return found
    raise ValueError(f"{text!r} is no format of experts; one such as {_examples()} was expected.")


def _examples() -> str:
    return ", ".join(repr(cls.example) for cls in _FORMATS if cls.example)
