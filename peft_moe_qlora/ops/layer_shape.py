"""Sizes of an experts layer for which tiles are measured."""

from __future__ import annotations

from typing import NamedTuple

TOKENS = (16, 512, 4096, 16384)
"""Numbers of tokens from which the default numbers of rows are derived."""


class LayerShape(NamedTuple):
    """Sizes of an experts layer: E, H, I, K, orientation of the matrices, and whether there is a gate."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    is_transposed: bool = False
    has_gate: bool = True

    def default_rows(self) -> tuple[float, ...]:
        """Typical rows per expert in generation and in training on shorter and longer sequences."""
        return tuple(tokens * self.top_k / self.experts for tokens in TOKENS)
