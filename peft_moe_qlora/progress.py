"""When a progress bar is shown of what is mostly done in a moment."""

from __future__ import annotations

PATIENCE = 3.0
"""Seconds before such a bar appears (`delay` of tqdm)."""
