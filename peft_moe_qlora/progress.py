"""Signs of progress for operations that usually finish quickly."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm.auto import tqdm

PATIENCE = 3.0
"""Seconds before a bar appears (`delay` of tqdm)."""

LARGE_FILE = 2**30
"""Bytes from which writing a file is announced."""


def announce_file(file: Path, num_bytes: int) -> None:
    """Prints a line to stderr before a large file is written in one call, which no bar can follow."""
    if num_bytes >= LARGE_FILE:
        tqdm.write(f"Writing {file} ({num_bytes / 2**30:.1f} GiB)", file=sys.stderr)
