"""int8: integers, one per byte in two's complement, with a scale for each block of rows and columns.

Published by compressed-tensors as `int-quantized`: per channel (`W8A8`, `W8A16`), per tensor, in groups or blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..block_scaled import BlockScaled, grid_text, parse_grid
from ..format import register_format


@register_format
@dataclass(frozen=True)
class Int8Format(BlockScaled):
    """-128 to 127 in blocks: `"int8/channel"` (one scale per row), `"int8/1x128"`, `"int8/tensor"`.

    With a new scale, the largest weight has the code 127 or -127, so it is never clipped. Checkpoints may contain -128
    (compressed-tensors divides by 127.5); unchanged weights keep it.

    Args:
        block: as in `BlockScaled`.
        scale: as in `BlockScaled`.
    """

    block: tuple[int, int] = (1, 0)

    example: ClassVar[str] = "int8/channel"
    kernel_codes: ClassVar[str] = "int8"
    largest_value: ClassVar[float] = 127.0

    def __str__(self) -> str:
        return f"int8/{grid_text(self.block, self.scale)}"

    @classmethod
    def from_text(cls, text: str) -> Int8Format | None:
        name, _, grid = text.partition("/")
        found = parse_grid(grid) if name == "int8" else None
        return None if found is None else cls(*found)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.int8).float()

    def nearest_values(self, ratios: torch.Tensor) -> torch.Tensor:
        clamped = ratios.round().clamp(-128, self.largest_value)
        return clamped.to(torch.int8).view(torch.uint8)
