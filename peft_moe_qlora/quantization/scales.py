"""The choice of scales when a matrix is requantized."""

from __future__ import annotations

import torch

from .format import Format


def choose_scales(matrix: torch.Tensor, before: torch.Tensor, storage: Format, parts: int = 1) -> torch.Tensor:
    """`(num_blocks,)` fp32 scales of a `(rows, columns)` matrix: per block, the candidate of least squared error.

    Args:
        matrix: weights in the stored orientation.
        before: previous scales, which are candidates, too: if a delta is small, they keep most codes.
        storage: storage format.
        parts: number of parts of the matrix, as in `Format`.

    Raises:
        ValueError: a weight is not finite.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError("NaNs or infinite values detected in the merged weights.")
    blocks = storage.blocks(matrix, parts)
    largest = blocks.abs().amax(dim=1)
    best = torch.full_like(largest, torch.inf)
    chosen = largest.clone()
    for candidate in storage.candidates(largest, before):
        scale = candidate[:, None]
        error = (storage.values(storage.nearest(blocks, scale)) * scale - blocks).square().sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, candidate, chosen)
    return chosen
