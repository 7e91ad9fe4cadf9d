"""What lies beside the weights of a checkpoint, and comes along when it is merged: tokenizer, templates, licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..loading.checkpoint import check_inside
from .partial_directory import PartialDirectory

PICKLED = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
"""Ends of names of weights in other formats than safetensors."""

_WEIGHTS = (".safetensors", ".index.json", *PICKLED)


def names_beside(base: Path, output: PartialDirectory) -> list[str]:
    """The files of a checkpoint that aren't weights, hidden, or of an adapter.

    Args:
        base: directory of the checkpoint.
        output: that may be inside it.

    Raises:
        CheckpointError: one is a link out of the checkpoint.
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
            output.place(found[-1])  # refuses a name that can't be written
    return found


def copy_beside(base: Path, names: list[str], output: PartialDirectory, changed: Mapping[str, Any]) -> None:
    """Copies such files.

    Args:
        base: directory of the checkpoint.
        names: by `names_beside`.
        output: where they are copied to.
        changed: name -> plain data, of files to be written instead.

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
