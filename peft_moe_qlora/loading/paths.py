"""Checks of link targets, of file names that come from a checkpoint, and of names on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_LONGEST_NAME = 255
"""Longest file name, in bytes, that all file systems support."""


def is_plain_name(name: object) -> bool:
    """Whether a value is a relative path inside a directory on any system, separated by slashes, without hidden parts.

    `".."`, absolute paths, drives and backslashes are not allowed.
    """
    if not isinstance(name, str) or not name.isprintable() or re.search(r"\\|^[A-Za-z]:", name):
        return False
    return len(name.encode()) <= _LONGEST_NAME and not any(part[:1] in ("", ".") for part in name.split("/"))


def is_hub_name(name: str | Path) -> bool:
    """Whether a value may name a model on the hub, as `organization/model`; paths such as `./model` do not."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return "/" in str(name)


def refuse_missing(model: str | Path) -> None:
    """Checks that a model is a directory, or may be on the hub.

    Raises:
        ValueError: it is neither.
    """
    path = Path(model)
    if not path.is_dir() and (path.exists() or not is_hub_name(model)):
        raise ValueError(
            f"{model} is neither a directory nor the name of a model on the hub. Pass the directory of its checkpoint."
        )


def leads_out(path: Path, directory: Path) -> bool:
    """Whether a path, with links resolved, is outside a directory.

    If the directory is a snapshot in the hub's cache, the blobs of its repository, and blobs shared between
    repositories, count as inside.
    """
    real, root = (Path(os.path.realpath(one)) for one in (path, directory))
    if real == root or root in real.parents:
        return False
    snapshots = [one for one in (root, *root.parents) if one.parent.name == "snapshots"]
    return not any(_is_blob(real, snapshot.parent.parent) for snapshot in snapshots)


def _is_blob(file: Path, repository: Path) -> bool:
    # huggingface_hub: REPOSITORY/blobs/HASH, which may itself be a link to CACHE/blobs/HA/HASH
    if file.parent == Path(os.path.realpath(repository / "blobs")):
        return True
    store = Path(os.path.realpath(repository.parent / "blobs"))
    return file.parent.parent == store and file.name.startswith(file.parent.name)
