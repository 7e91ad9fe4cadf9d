"""int4: integers from -8 to 7, with a scale for each group of columns.

Published by compressed-tensors as `pack-quantized` (Kimi-K2-Thinking and later: groups of 32, bf16 scales). A code is
the integer plus 8, two codes per byte with the first in the low half. On little-endian machines, these are the bytes
of the int32 tensors in those files, which pack eight codes each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..block_scaled import SCALE_DTYPES, BlockScaled
from ..format import register_format

_SCALES = tuple(kind for kind in SCALE_DTYPES if kind != "e8m0")


@register_format
@dataclass(frozen=True)
class Int4Format(BlockScaled):
    """-8 to 7 in groups of columns: `"int4/32"`, `"int4/128+bf16"`, `"int4/channel"` (one scale per row).

    A new scale is a seventh of the largest weight, whose code is 7 or -7. Some quantizers divide by 7.5 to use -8,
    too, but this clips the largest weight if it is positive; and models trained in this format use the 15 symmetric
    codes. When weights are requantized, all 16 codes are candidates.

    Args:
        block: rows (always 1) and columns that share a scale; 0 columns for whole rows.
        scale: `"fp32"`, `"bf16"` or `"fp16"`.

    Raises:
        ValueError: `block` or `scale` has another value.
    """

    block: tuple[int, int] = (1, 32)

    codes_per_byte: ClassVar[int] = 2
    example: ClassVar[str] = "int4/32"
    kernel_codes: ClassVar[str] = "int4"
    largest_value: ClassVar[float] = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block[0] != 1 or self.scale not in _SCALES:
            raise ValueError(
                f"int4 has block=(1, columns) and scale in {_SCALES}. Found block={self.block}, scale={self.scale!r}."
            )

    def __str__(self) -> str:
        group = str(self.block[1] or "channel")
        return f"int4/{group}" + ("" if self.scale == "fp32" else f"+{self.scale}")

    @classmethod
    def from_text(cls, text: str) -> Int4Format | None:
        match = re.fullmatch(rf"int4/(channel|[1-9][0-9]*)(?:\+({'|'.join(_SCALES)}))?", text)
        if match is None:
            return None
        return cls((1, 0 if match[1] == "channel" else int(match[1])), match[2] or "fp32")

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float() - 8

    def nearest_values(self, ratios: torch.Tensor) -> torch.Tensor:
        return (ratios.round().clamp(-8, 7) + 8).to(torch.uint8)
