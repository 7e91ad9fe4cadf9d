"""Base class of formats with a grid of scales, one per block of rows and columns: FP8, MX, and integers in groups.

Codes are stored row by row, one per byte or two per byte with the first in the low half. Scales are `(R, C)`, one per
block, stored as the bits of the dtype in which they are published. If a matrix consists of several parts along its
rows, each part has a separate grid, and R is the sum of their rows.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from .format import Format, Spec, Tensors
from .scales import choose_scales

SCALE_DTYPES = {
    "fp32": torch.int32,
    "bf16": torch.int16,
    "fp16": torch.int16,
    "e8m0": torch.uint8,
}
"""Kind of scale -> integer dtype of its bits. e8m0 is a power of two, 2^(bits - 127) (OCP MX 1.0, section 5.4.1)."""

SCALE_LIMIT = 2.0**7
"""Upper bound of scales: the kernels' decoding needs the exponents above. Model weights never need larger scales."""

WHOLE_ROW = 2**30
"""Stands for the columns of a block that spans a whole row, whose number may not be a power of two."""

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {(1, 0): "channel", (0, 0): "tensor"}


def grid_text(block: tuple[int, int], scale: str) -> str:
    """Block and kind of scale as written in the name of a format: `"128x128"`, `"channel+bf16"`, `"tensor"`."""
    name = _NAMES.get(block) or "x".join(map(str, block))
    return name + ("" if scale == "fp32" else f"+{scale}")


def parse_grid(text: str) -> tuple[tuple[int, int], str] | None:
    """Inverse of `grid_text`; None if the text is not of this form."""
    match = re.fullmatch(rf"(channel|tensor|[0-9]+x[0-9]+)(?:\+({'|'.join(SCALE_DTYPES)}))?", text)
    if match is None:
        return None
    named = {name: block for block, name in _NAMES.items()}
    block = named.get(match[1]) or tuple(int(size) for size in match[1].split("x"))
    return block, match[2] or "fp32"


def scale_values(bits: torch.Tensor, kind: str) -> torch.Tensor:
    """Decodes stored bits to fp32 scales."""
    if kind != "e8m0":
        return bits.view(_FLOATS[kind]).float()
    # the bits are the exponent of an fp32 number, except 2^-127, which is subnormal
    values = (bits.int() << 23).view(torch.float32)
    return torch.where(bits == 0, 2.0**-127, torch.where(bits == 255, torch.nan, values))


def scale_bits(scales: torch.Tensor, kind: str) -> torch.Tensor:
    """Encodes fp32 scales as stored bits; for e8m0, rounded up to a power of two."""
    if kind != "e8m0":
        return scales.to(_FLOATS[kind]).view(SCALE_DTYPES[kind])
    mantissa, exponent = torch.frexp(scales)
    exponent = exponent - (mantissa == 0.5).int()
    return (exponent + 127).clamp(0, 254).to(torch.uint8)


@dataclass(frozen=True)
class BlockScaled(Format):
    """A format with a grid of scales.

    Args:
        block: rows and columns that share a scale; 0 for all rows or columns of a part.
        scale: kind of the scales, one of `SCALE_DTYPES`.

    Raises:
        ValueError: `block` or `scale` is invalid.
    """

    block: tuple[int, int] = (128, 128)
    scale: str = "fp32"

    is_out_in: ClassVar[bool] = True
    codes_per_byte: ClassVar[int] = 1
    largest_value: ClassVar[float]
    """Largest value of a code, before scaling."""

    def __post_init__(self) -> None:
        sizes = self.block
        if not isinstance(sizes, tuple) or len(sizes) != 2 or any(type(n) is not int or n < 0 for n in sizes):
            raise ValueError(f"block={sizes!r:.200}: expected a tuple (rows, columns), with 0 for all.")
        if self.scale not in SCALE_DTYPES:
            raise ValueError(f"scale={self.scale!r:.200} is unknown. Choose one of {tuple(SCALE_DTYPES)}.")

    @abstractmethod
    def values(self, codes: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def nearest_values(self, ratios: torch.Tensor) -> torch.Tensor:
        """The uint8 codes whose values are nearest."""

    def grid(self, rows: int, columns: int, parts: int = 1) -> tuple[int, int]:
        """`(R, C)`: the shape of the scales."""
        block_rows, block_columns = self.block_of(rows, columns, parts)
        return parts * -(-(rows // parts) // block_rows), -(-columns // block_columns)

    def block_of(self, rows: int, columns: int, parts: int = 1) -> tuple[int, int]:
        """Rows and columns of a block of a matrix, with 0 replaced by the actual size."""
        return min(self.block[0] or rows, rows // parts), min(self.block[1] or columns, columns)

    def tensors(self, rows: int, columns: int, parts: int = 1) -> dict[str, Spec]:
        return {
            "codes": Spec((rows, columns // self.codes_per_byte), torch.uint8),
            "block_scales": Spec(self.grid(rows, columns, parts), SCALE_DTYPES[self.scale]),
        }

    def quantize(self, matrix: torch.Tensor, parts: int = 1) -> dict[str, torch.Tensor]:
        rows, columns = matrix.shape
        self.check_shape(rows, columns, parts)
        matrix = matrix.float()
        stored = self.store_scales(self.fresh_scales(self.blocks(matrix, parts)), rows, columns, parts)
        scales = self.scales({name: tensor[None] for name, tensor in stored.items()})[0]
        codes = self.nearest(matrix, self.scale_of_weights(scales, rows, columns, parts))
        return {**self.store_codes(codes), **stored}

    def requantize(self, matrix: torch.Tensor, before: Tensors, parts: int = 1) -> dict[str, torch.Tensor]:
        """Tries the previous scales, too: if new scales differ from them, they change every weight."""
        rows, columns = matrix.shape
        old = self.scales({name: tensor[None] for name, tensor in before.items()})[0]
        stored = self.store_scales_anew(choose_scales(matrix, old, self, parts), before, rows, columns, parts)
        # compute codes from the stored scales, which may be rounded
        scales = self.scales({name: tensor[None] for name, tensor in stored.items()})[0]
        return {
            **self.store_codes(self.nearest(matrix, self.scale_of_weights(scales, rows, columns, parts))),
            **stored,
        }

    def check_shape(self, rows: int, columns: int, parts: int = 1) -> None:
        """Checks that a matrix can be stored.

        Raises:
            ValueError: the parts have different sizes, or the codes of a row do not fill whole bytes.
        """
        if rows % parts or columns % self.codes_per_byte:
            raise ValueError(
                f"A matrix of shape ({rows}, {columns}) with {parts} part(s) cannot be stored as {self}. Expected "
                f"rows to be a multiple of {parts}, and columns a multiple of {self.codes_per_byte}. Use another "
                "storage, or leave the module in 16 bits."
            )

    def fresh_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """`(num_blocks,)` scales for `(num_blocks, weights of a block)`; 1 where all weights are 0."""
        largest = blocks.abs().amax(dim=1)
        return torch.where(largest == 0, 1.0, largest / self.largest_value)

    def dequantize(
        self, tensors: Tensors, rows: int, columns: int, dtype: torch.dtype, parts: int = 1
    ) -> torch.Tensor:
        codes, scales = tensors["codes"], self.scales(tensors)
        values = self.values(self.codes_of_bytes(codes))
        return torch.stack(
            [
                (one * self.scale_of_weights(its_scales, rows, columns, parts)).to(dtype)
                for one, its_scales in zip(values, scales)
            ]
        )

    def matrices_at_a_time(self, rows: int, columns: int) -> int:
        return max(1, 2**26 // (rows * columns))  # bounds the fp32 intermediates

    @property
    def scale_kind(self) -> str:
        return self.scale

    def tile_block(self, rows: int, columns: int, parts: int = 1) -> tuple[int, int] | None:
        block_rows, block_columns = self.block_of(rows, columns, parts)
        if block_columns >= columns:
            block_columns = WHOLE_ROW
        is_power_of_two = block_columns & (block_columns - 1) == 0
        return (block_rows, block_columns) if is_power_of_two and block_columns >= 16 else None

    def codes_of_bytes(self, stored: torch.Tensor) -> torch.Tensor:
        """`(..., columns)` codes of `(..., columns / codes_per_byte)` bytes."""
        if self.codes_per_byte == 1:
            return stored
        return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)

    def blocks(self, matrix: torch.Tensor, parts: int = 1) -> torch.Tensor:
        rows, columns = matrix.shape
        block_rows, block_columns = self.block_of(rows, columns, parts)
        whole = matrix.view(parts, rows // parts, columns)
        whole = pad(whole, (0, -columns % block_columns, 0, -(rows // parts) % block_rows))
        cut = whole.unflatten(2, (-1, block_columns)).unflatten(1, (-1, block_rows))
        return cut.transpose(2, 3).flatten(3).flatten(0, 2)

    def scales(self, tensors: Tensors) -> torch.Tensor:
        return scale_values(tensors["block_scales"], self.scale).flatten(1)

    def scale_of_weights(self, scales: torch.Tensor, rows: int, columns: int, parts: int = 1) -> torch.Tensor:
        block_rows, block_columns = self.block_of(rows, columns, parts)
        grid = scales.view(parts, -1, self.grid(rows, columns, parts)[1])
        of_rows = grid.repeat_interleave(block_rows, dim=1)[:, : rows // parts].flatten(0, 1)
        return of_rows.repeat_interleave(block_columns, dim=1)[:, :columns]

    def candidates(self, largest: torch.Tensor, before: torch.Tensor) -> Iterable[torch.Tensor]:
        """The previous scale, which keeps every weight without a delta; twice and half of it; and a new scale."""
        fresh = torch.where(largest == 0, 1.0, largest / self.largest_value)
        rounded = (scale_values(scale_bits(one, self.scale), self.scale) for one in (before * 2, before / 2, fresh))
        return (before, *rounded)

    def nearest(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self.nearest_values(torch.where(scales == 0, 0, weights / scales))

    def store_codes(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.codes_per_byte == 1:
            return {"codes": codes}
        return {"codes": codes[:, ::2] | codes[:, 1::2] << 4}

    def check_scales(self, scales: torch.Tensor) -> None:
        """Checks that the kernels can decode the scales.

        Raises:
            ValueError: a scale is too large.
        """
        if (scales >= SCALE_LIMIT).any():
            raise ValueError(
                f"A block has the scale {float(scales.max()):.3g}. Expected less than {SCALE_LIMIT:g} for {self}. "
                f"Weights above {SCALE_LIMIT * self.largest_value:.3g} are probably damaged."
            )

    def store_scales(self, scales: torch.Tensor, rows: int, columns: int, parts: int = 1) -> dict[str, torch.Tensor]:
        bits = scale_bits(scales, self.scale)
        self.check_scales(scale_values(bits, self.scale))
        return {"block_scales": bits.view(self.grid(rows, columns, parts))}
