"""Inputs of a merge: the directory of the base, and the adapters that are already merged into it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download

from ..layouts.base_model import revision_of_base
from ..layouts.read import read_config, weights_file
from ..loading.paths import refuse_missing
from .beside import PICKLED
from .report import REPORT_NAME, MergeReport


def checkpoint_directory(base: str | Path, adapter: Path) -> Path:
    """Directory of a checkpoint, which is downloaded from the hub unless it is local.

    Args:
        base: directory, or name on the hub.
        adapter: directory of an adapter, whose config may name the revision of its base.

    Raises:
        ValueError: `base` is neither a directory nor a model on the hub.
    """
    if Path(base).is_dir():
        return Path(base)
    refuse_missing(base)
    left_out = [*(f"*{ending}" for ending in PICKLED), "original/*"]
    revision = revision_of_base(read_config(adapter), base)
    return Path(snapshot_download(str(base), revision=revision, ignore_patterns=left_out))


def adapter_digest(adapter: Path) -> str:
    """SHA-256 of an adapter's weights."""
    digest = hashlib.sha256()
    with weights_file(adapter).open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def digests_merged_before(base: Path, digest: str) -> tuple[str, ...]:
    """The digests of the adapters that are already merged into a base, according to its report.

    Args:
        base: directory of the base.
        digest: digest of the adapter to merge.

    Raises:
        ValueError: the adapter is already merged into the base.
    """
    report = MergeReport.read(base)
    if report is None:
        return ()
    found = (*report.merged_before, report.adapter_sha256)
    if digest in found:
        raise ValueError(
            f"This adapter is already merged into {base}, according to {base / REPORT_NAME}. Merging it again would "
            "add its deltas twice. Use this checkpoint as it is, or pass the original base."
        )
    return found
