"""What a merge starts from: the base's directory, and which adapters are in it already."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download

from ..layouts.base_model import HUB_NAME, revision_of_base
from ..layouts.read import read_config, weights_file
from .beside import PICKLED
from .report import REPORT_NAME, MergeReport


def checkpoint_directory(base: str | Path, adapter: Path) -> Path:
    """Where a checkpoint is, downloaded from the hub unless it is a directory.

    Args:
        base: directory, or name on the hub.
        adapter: directory of an adapter, which may remember the revision of its base.

    Raises:
        ValueError: it is neither.
    """
    if Path(base).is_dir():
        return Path(base)
    if Path(base).exists() or not HUB_NAME.fullmatch(str(base)):
        raise ValueError(
            f"{base} is neither a directory nor the name of a model on the hub. Name the base's checkpoint."
        )
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
    """The digests of the adapters that were merged to give a base, as its report says.

    Args:
        base: directory.
        digest: of the adapter that is to be merged.

    Raises:
        ValueError: that is among them.
    """
    report = MergeReport.read(base)
    if report is None:
        return ()
    found = (*report.merged_before, report.adapter_sha256)
    if digest in found:
        raise ValueError(
            f"{base} has this adapter merged into it already, as {base / REPORT_NAME} says. Merging twice adds it "
            "twice."
        )
    return found
