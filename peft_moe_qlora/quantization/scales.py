"""The scales that a matrix is rounded by anew."""

from __future__ import annotations

import torch

from .format import Format


def choose_scales(matrix: torch.Tensor, before: torch.Tensor, storage: Format, parts: int = 1) -> torch.Tensor:
    """`(num_blocks,)` fp32 scales of a `(rows, columns)` matrix: of a few, those of least squared error.

    Args:
        matrix: as stored.
        before: scales to be tried too; if a delta is small, most codes are still right with them.
        storage: the format.
        parts: of the matrix, as in `Format`.

    Raises:
        ValueError: a weight is not finite.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError("NaNs detected in the merged weights, or values out of range.")
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
