"""NVFP4: e2m1 codes, two per byte with the first in the low half, and two levels of scales.

16 columns share an e4m3 scale, and a matrix has a second, fp32 scale. In ModelOpt, the second scale multiplies the
others (`weight_scale_2`); in compressed-tensors, it divides them (`weight_global_scale`). Rounding makes a reciprocal
inexact, so these are two formats. A weight is the value of its code times the fp32 scale computed from both levels,
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..block_scaled import BlockScaled
from ..format import Spec, Tensors, register_format
from .mxfp4 import e2m1_values, nearest_e2m1

_LARGEST = 448.0
"""Largest number of e4m3."""
_SMALLEST = 2.0**-9
_OVER = 464.0
"""Largest number that rounds to 448 in e4m3."""


@register_format
@dataclass(frozen=True)
class Nvfp4Format(BlockScaled):
    """`"nvfp4"`, whose second scale multiplies, and `"nvfp4/inverse"`, whose second scale divides.

    Each part of a matrix, such as gate and up projection, has a second scale. New second scales are equal for all
    parts, because engines use the first for all.

    Args:
        block: fixed.
        scale: kind of the combined scale; fixed.
        is_inverse: whether the second scale divides.

    Raises:
        ValueError: `block`, `scale` or `is_inverse` has another value.
    """

    block: tuple[int, int] = (1, 16)
    scale: str = "fp32"
    is_inverse: bool = False

    codes_per_byte: ClassVar[int] = 2
    example: ClassVar[str] = "nvfp4"
    kernel_codes: ClassVar[str] = "e2m1"
    largest_value: ClassVar[float] = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.block, self.scale) != ((1, 16), "fp32") or not isinstance(self.is_inverse, bool):
            raise ValueError(
                "NVFP4 has block=(1, 16), scale='fp32', and is_inverse True or False. Found "
                f"block={self.block}, scale={self.scale!r}, is_inverse={self.is_inverse!r:.200}."
            )

    def __str__(self) -> str:
        return "nvfp4/inverse" if self.is_inverse else "nvfp4"

    @classmethod
    def from_text(cls, text: str) -> Nvfp4Format | None:
        return cls(is_inverse=text != "nvfp4") if text in ("nvfp4", "nvfp4/inverse") else None

    @property
    def second_level(self) -> str:
        return "over" if self.is_inverse else "times"

    def tensors(self, rows: int, columns: int, parts: int = 1) -> dict[str, Spec]:
        return {
            "codes": Spec((rows, columns // 2), torch.uint8),
            "block_scales": Spec(self.grid(rows, columns, parts), torch.uint8),
            "global_scales": Spec((parts,), torch.int32),
        }

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return e2m1_values(codes.device)[codes.int()]

    def nearest_values(self, ratios: torch.Tensor) -> torch.Tensor:
        return nearest_e2m1(ratios)

    def scales(self, tensors: Tensors) -> torch.Tensor:
        whole = tensors["global_scales"].view(torch.float32)
        blocks = tensors["block_scales"].view(torch.float8_e4m3fn).float().unflatten(1, (whole.shape[1], -1))
        whole = whole[:, :, None, None]
        return (blocks / whole if self.is_inverse else blocks * whole).flatten(1)

    def fresh_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks.abs().amax(dim=1) / self.largest_value

    def candidates(self, largest: torch.Tensor, before: torch.Tensor) -> Iterable[torch.Tensor]:
        """The previous scales, which keep every weight without a delta; twice and half of them; and two new scales.

        With the new scales, the largest weight becomes 6 or 4.
        """
        fresh = (torch.where(largest == 0, before, largest / value) for value in (6, 4))
        return (before, before * 2, before / 2, *fresh)

    def store_scales(self, scales: torch.Tensor, rows: int, columns: int, parts: int = 1) -> dict[str, torch.Tensor]:
        largest = scales.max()
        largest = torch.where(largest == 0, _LARGEST, largest)
        whole = _LARGEST / largest if self.is_inverse else largest / _LARGEST
        return self._stored(scales, whole.expand(parts), rows, columns)

    def store_scales_anew(
        self, scales: torch.Tensor, before: Tensors, rows: int, columns: int, parts: int = 1
    ) -> dict[str, torch.Tensor]:
        """Keeps the second scales: a new one would change the rounding of all e4m3 scales, and so all weights.

        If a block's scale exceeds the range of e4m3, the second scales are multiplied by a power of two, which changes
        the e4m3 scales without rounding error.
        """
        whole = before["global_scales"].view(torch.float32)
        needed = self._over_whole(scales, whole).max()
        mantissa, exponent = torch.frexp(needed / _OVER)
        exponent = exponent - (mantissa == 0.5).int()  # rounds up to a power of two
        factor = torch.ldexp(torch.ones_like(needed), exponent.clamp(min=0))
        return self._stored(scales, whole / factor if self.is_inverse else whole * factor, rows, columns)

    def _over_whole(self, scales: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """`(parts, blocks)`: the scales of the first level, before rounding."""
        of_parts = scales.view(len(whole), -1)
        return of_parts * whole[:, None] if self.is_inverse else of_parts / whole[:, None]

    def _stored(self, scales: torch.Tensor, whole: torch.Tensor, rows: int, columns: int) -> dict[str, torch.Tensor]:
        self.check_scales(scales)
        ratios = self._over_whole(scales, whole).clamp(_SMALLEST, _LARGEST)
        ratios = torch.where(scales.view_as(ratios) == 0, 1.0, ratios)  # all weights are 0
        return {
            "block_scales": ratios.to(torch.float8_e4m3fn)
            .view(torch.uint8)
            .view(self.grid(rows, columns, len(whole))),
            "global_scales": whole.contiguous().view(torch.int32),
        }
