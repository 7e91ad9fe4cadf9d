"""A format that the package does not have: 6 bits, four codes in three bytes, a bf16 scale for 16 x 16 weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_moe_qlora.quantization import Spec, register_format
from peft_moe_qlora.quantization.block_scaled import BlockScaled


@register_format
@dataclass(frozen=True)
class SixBits(BlockScaled):
    """Integers from -32 to 31."""

    block: tuple[int, int] = (16, 16)
    scale: str = "bf16"
    largest_value = 31.0

    def __str__(self) -> str:
        return "six"

    @classmethod
    def from_text(cls, text: str) -> SixBits | None:
        return cls() if text == "six" else None

    def tensors(self, rows: int, columns: int, parts: int = 1) -> dict[str, Spec]:
        return super().tensors(rows, columns, parts) | {"codes": Spec((rows, columns // 4, 3), torch.uint8)}

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float() - 32

    def nearest_values(self, ratios: torch.Tensor) -> torch.Tensor:
        return (ratios.round().clamp(-32, 31) + 32).to(torch.uint8)

    def store_codes(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b, c, d = codes.unflatten(1, (-1, 4)).unbind(2)
        return {"codes": torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), dim=2)}

    def codes_of_bytes(self, stored: torch.Tensor) -> torch.Tensor:
        a, b, c = stored.unbind(-1)
        return torch.stack((a & 63, (a >> 6 | b << 2) & 63, (b >> 4 | c << 4) & 63, c >> 2), dim=-1).flatten(-2)
