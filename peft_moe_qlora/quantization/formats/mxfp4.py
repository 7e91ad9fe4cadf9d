"""MXFP4: e2m1 codes, two per byte with the first in the low half, and a power-of-two scale for 32 columns.

OCP Microscaling Formats 1.0, section 5.3; published for gpt-oss (`quant_method: mxfp4`), DeepSeek-V4 and Kimi-K3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from ..block_scaled import BlockScaled
from ..format import register_format


@cache
def e2m1_values(device: torch.device) -> torch.Tensor:
    """The 16 values of e2m1; the last eight are the negatives of the first eight."""
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32, device=device)
    return torch.cat((positive, -positive))


def nearest_e2m1(ratios: torch.Tensor) -> torch.Tensor:
    """The nearest uint8 codes; ties are rounded to even."""
    positive = e2m1_values(ratios.device)[:8]
    middles, sizes = (positive[1:] + positive[:-1]) / 2, ratios.abs().contiguous()
    low, high = torch.bucketize(sizes, middles), torch.bucketize(sizes, middles, right=True)
    codes = torch.where(low % 2 == 0, low, high).to(torch.uint8)
    return codes | torch.signbit(ratios).to(torch.uint8) << 3


@register_format
@dataclass(frozen=True)
class Mxfp4Format(BlockScaled):
    """`"mxfp4"`: blocks of 1 x 32, e8m0 scales.

    Args:
        block: fixed.
        scale: fixed.

    Raises:
        ValueError: `block` or `scale` has another value.
    """

    block: tuple[int, int] = (1, 32)
    scale: str = "e8m0"

    codes_per_byte: ClassVar[int] = 2
    example: ClassVar[str] = "mxfp4"
    kernel_codes: ClassVar[str] = "e2m1"
    largest_value: ClassVar[float] = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.block, self.scale) != ((1, 32), "e8m0"):
            raise ValueError(
                f"MXFP4 has block=(1, 32) and scale='e8m0'. Found block={self.block}, scale={self.scale!r}."
            )

    def __str__(self) -> str:
        return "mxfp4"

    @classmethod
    def from_text(cls, text: str) -> Mxfp4Format | None:
        return cls() if text == "mxfp4" else None

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return e2m1_values(codes.device)[codes.int()]

    def nearest_values(self, ratios: torch.Tensor) -> torch.Tensor:
        return nearest_e2m1(ratios)

    def fresh_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """The power of two of least squared error: the smallest one that does not clip, or half of it."""
        larger = self.largest_scales(blocks.abs().amax(dim=1))
        errors = [
            (self.values(self.nearest_values(blocks / scale[:, None])) * scale[:, None] - blocks).square().sum(dim=1)
            for scale in (larger / 2, larger)
        ]
        return torch.where(errors[0] < errors[1], larger / 2, larger)

    def largest_scales(self, largest: torch.Tensor) -> torch.Tensor:
        """The smallest powers of two with which no weight is clipped; 1 where all weights are 0."""
        _, exponent = torch.frexp(largest)  # divided by 2^(exponent - 3), the largest is in [4, 8)
        scales = torch.ldexp(torch.ones_like(largest), exponent - 3)
        scales = torch.where(largest > 6 * scales, 2 * scales, scales)
        return torch.where(largest == 0, 1.0, scales.clamp(2.0**-126, 2.0**127))
