"""Tables of tiles measured with `peft-moe-qlora tune`, in the user's cache directory.

There is one file per GPU, compute capability and Triton version. Files are replaced atomically.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .tile_table import Entry, parse_entries

_KIND = "peft-moe-qlora tiles"
_VERSION = 1


class Gpu(NamedTuple):
    """The GPU and the Triton version of a measurement."""

    device: str
    capability: tuple[int, int]
    triton: str

    @property
    def key(self) -> dict[str, Any]:
        return {"device": self.device, "capability": list(self.capability), "triton": self.triton}


class UserTable(NamedTuple):
    """Contents of a file: entries, newest first, and the date of the last measurement."""

    measured: str
    entries: tuple[Entry, ...]

    def origin(self, device: str) -> str:
        """Origin of the tiles, and the products `(columns x contraction)` that they are for."""
        shapes = dict.fromkeys(f"{entry.n}x{entry.k}" for entry in self.entries)
        return f"tiles measured on {device} by tune, {self.measured}, for {', '.join(shapes)}"


def cache_directory() -> Path:
    """The user's cache directory for this package, by the platform's convention."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        # the XDG specification says to ignore relative paths
        named = os.environ.get("XDG_CACHE_HOME", "")
        base = named if os.path.isabs(named) else Path.home() / ".cache"
    return Path(base) / "peft-moe-qlora"


def table_path(gpu: Gpu) -> Path:
    """Path of the file for a GPU; replaces characters that a file system may reject."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu.device} sm{gpu.capability[0]}{gpu.capability[1]} triton {gpu.triton}")
    return cache_directory() / "tiles" / f"{name}.json"


def read_user_table(gpu: Gpu) -> UserTable | None:
    """Reads the measurements for a GPU; None if there are none.

    Raises:
        ValueError: the file is invalid or for another GPU.
    """
    data = _read(gpu)
    return None if data is None else UserTable(data["measured"], data["parsed"])


def write_user_table(gpu: Gpu, entries: Sequence[dict[str, Any]], measured: str) -> Path:
    """Adds JSON entries to the file for a GPU; they replace entries with the same weight, direction and shape.

    Raises:
        ValueError: the existing file is invalid.
    """
    parse_entries(list(entries))
    data = _read(gpu)
    new = {_question(entry) for entry in entries}
    kept = [] if data is None else [entry for entry in data["entries"] if _question(entry) not in new]
    path = table_path(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {"kind": _KIND, "version": _VERSION, **gpu.key, "measured": measured, "entries": [*entries, *kept]}
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def _question(entry: dict[str, Any]) -> tuple:
    return entry["weight"], entry["along"], entry.get("n"), entry.get("k")


def _read(gpu: Gpu) -> dict[str, Any] | None:
    path = table_path(gpu)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(_refusal(path, f"it is not a text file: {error}")) from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(_refusal(path, f"it is not valid JSON: {error}")) from error
    found = data if isinstance(data, dict) else {}
    if found.get("kind") != _KIND or found.get("version") != _VERSION:
        raise ValueError(
            _refusal(
                path,
                f"expected kind {_KIND!r}, version {_VERSION}, found kind {found.get('kind')!r}, version "
                f"{found.get('version')!r}",
            )
        )
    for name, expected in gpu.key.items():
        if found.get(name) != expected:
            raise ValueError(_refusal(path, f"expected {name} {expected!r}, found {found.get(name)!r}"))
    if not isinstance(found.get("measured"), str) or not isinstance(found.get("entries"), list):
        raise ValueError(_refusal(path, "it has no date of measurement or no list of entries"))
    try:
        return {**found, "parsed": parse_entries(found["entries"])}
    except ValueError as error:
        raise ValueError(_refusal(path, str(error))) from error


def _refusal(path: Path, reason: str) -> str:
    return f"{path} is not a valid tile table: {reason}. Delete the file and run `peft-moe-qlora tune` again."
