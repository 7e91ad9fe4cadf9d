"""The non-weight files of a checkpoint, which a merge copies: tokenizer, templates, licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..loading.checkpoint import check_inside
from .partial_directory import PartialDirectory

PICKLED = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
"""Suffixes of weight files in other formats than safetensors."""

_WEIGHTS = (".safetensors", ".index.json", *PICKLED)


def names_beside(base: Path, output: PartialDirectory) -> list[str]:
    """The files of a checkpoint except weights, hidden files, and files of an adapter.

    Args:
        base: directory of the checkpoint.
        output: the output directory, which may be inside the checkpoint's.

    Raises:
        CheckpointError: a file is a link that leads out of the checkpoint.
    """
    found = []
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        is_hidden = any(part.startswith(".") for part in name.parts)
        is_own = output.partial in Path(os.path.realpath(path)).parents or path.name.startswith("adapter_")
        if is_own or is_hidden or path.name.endswith(_WEIGHTS):
            continue
        check_inside(path, base)
        if path.is_file():
            found.append(name.as_posix())
            output.place(found[-1])  # rejects an invalid name
    return found


def copy_beside(base: Path, names: list[str], output: PartialDirectory, changed: Mapping[str, Any]) -> None:
    """Copies the files found by `names_beside`.

    Args:
        base: directory of the checkpoint.
        names: the result of `names_beside`.
        output: the output directory.
        changed: name -> JSON values, for files that are written instead of copied.

    Raises:
        CheckpointError: see `names_beside`.
    """
    for name in names:
        if name not in changed:
            check_inside(base / name, base)
            shutil.copyfile(base / name, output.path_to_write(name))
            output.written(name)
    for name, values in changed.items():
        output.write_json(name, values)
