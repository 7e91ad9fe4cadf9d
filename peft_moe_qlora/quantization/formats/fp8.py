"""FP8: e4m3 codes, one per byte, with a scale for each block of rows and columns.

Published as `quant_method: fp8` (DeepSeek-V3 and others, blocks of 128 x 128), by compressed-tensors as
`float-quantized` (per channel, per tensor, in blocks), and as MXFP8 with blocks of 1 x 32 and power-of-two scales.
Values are those of OCP FP8 E4M3 (arXiv:2209.05433), which has no infinity; 0x7f and 0xff are NaN and never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..block_scaled import BlockScaled, grid_text, parse_grid
from ..format import register_format


@register_format
@dataclass(frozen=True)
class Fp8Format(BlockScaled):
    """e4m3 in blocks: `"fp8/128x128"`, `"fp8/channel"` (one scale per row), `"fp8/tensor"`, `"fp8/1x32+e8m0"` (MXFP8).

    Args:
        block: as in `BlockScaled`.
        scale: as in `BlockScaled`.
    """

    example: ClassVar[str] = "fp8/128x128"
    kernel_codes: ClassVar[str] = "e4m3"
    largest_value: ClassVar[float] = 448.0

    def __str__(self) -> str:
        return f"fp8/{grid_text(self.block, self.scale)}"

    @classmethod
    def from_text(cls, text: str) -> Fp8Format | None:
        name, _, grid = text.partition("/")
        found = parse_grid(grid) if name == "fp8" else None
        return None if found is None else cls(*found)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def nearest_values(self, ratios: torch.Tensor) -> torch.Tensor:
        # some versions of torch cast values out of range to NaN
        clamped = ratios.clamp(-self.largest_value, self.largest_value)
        return clamped.to(torch.float8_e4m3fn).view(torch.uint8)
