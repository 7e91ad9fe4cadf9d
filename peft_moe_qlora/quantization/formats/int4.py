"""int4: whole numbers from -8 to 7, with a scale for each group of columns.

Published by compressed-tensors as `pack-quantized` (Kimi-K2-Thinking and later: groups of 32, scales bf16). Codes are
the numbers plus 8, two to a byte with the first in the low half, which is what the int32 of those files hold, eight
to each, on machines that put the lowest byte first.
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
    """-8 to 7 in groups of columns: `"int4/32"`, `"int4/128+bf16"`, `"int4/channel"` for whole rows.

    Fresh scales are a seventh of the largest weight, whose code then is 7 or -7. With -8 in use, as some quantizers do
    by dividing by 7.5, the largest weight would be clipped where it is positive; and models that were trained in this
    format have the 15 codes that are symmetric. When weights are rounded anew, all 16 codes are tried.

    Args:
        block: rows, which is 1, and columns that share a scale; 0 for whole rows.
        scale: fp32, bf16 or fp16.

    Raises:
        ValueError: they are others.
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
                f"int4 has blocks of one row and scales in one of {_SCALES}, not {self.block} and {self.scale}."
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
