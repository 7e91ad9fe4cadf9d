"""The sizes of an experts layer that tiles are measured for."""

from __future__ import annotations

from typing import NamedTuple

TOKENS = (16, 512, 4096, 16384)
"""By which the numbers of rows are chosen that are measured unless others are asked for."""


class LayerShape(NamedTuple):
    """Sizes of an experts layer: E, H, I, K, and whether matrices are stored `(in, out)`."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    is_transposed: bool = False
    has_gate: bool = True

    def default_rows(self) -> tuple[float, ...]:
        """Typical rows per expert in generation, and in training on shorter and longer sequences."""
        return tuple(tokens * self.top_k / self.experts for tokens in TOKENS)
