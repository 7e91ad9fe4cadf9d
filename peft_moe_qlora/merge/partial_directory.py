"""An output directory that is created atomically, after all of its files are written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock

from ..loading.paths import is_plain_name

_NOTES = ".unfinished"
"""Subdirectory with the state needed to resume; checkpoint files are never in a hidden directory."""
_PLAN = "plan.json"
_CAN_BE_TAKEN_UP = "can_be_taken_up"


class PartialDirectory:
    """Writes files to `DIRECTORY.partial`, which cannot be loaded without its config.json, and renames it at the end.

    Finished files of an interrupted run are kept for the next run of the same task. The lock file `.DIRECTORY.lock` in
    the parent directory excludes concurrent runs until the directory is complete.

    Args:
        directory: the output directory; must be empty or not exist.
        task: JSON values that identify the work.
        can_be_taken_up: whether a later run of the same task can resume the work.

    Raises:
        ValueError: the directory is not empty, is a mount point, or has unfinished work of another task.
    """

    def __init__(self, directory: str | Path, task: Mapping[str, Any], can_be_taken_up: bool = True) -> None:
        self.directory = Path(directory).resolve()
        self.partial = self.directory.with_name(f"{self.directory.name}.partial")
        self._lock = self.directory.with_name(f".{self.directory.name}.lock")
        self._can_be_taken_up = can_be_taken_up
        self._task = dict(task) if can_be_taken_up else {**task, _CAN_BE_TAKEN_UP: False}
        if self.directory.is_mount():
            raise ValueError(
                f"{self.directory} is a mount point, so the finished directory cannot be renamed to it. Choose a "
                "subdirectory of it."
            )
        self._check()

    def _check(self) -> bool:
        """Whether the work of an earlier run can be resumed.

        Raises:
            ValueError: the directory is not empty, or has unfinished work of another task.
        """
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            what = "is not empty. It may contain a finished merge"
            raise ValueError(
                f"{self.directory} {what if self.directory.is_dir() else 'is a file'}. Choose another directory, or "
                "remove it."
            )
        plan = self.partial / _NOTES / _PLAN
        known = _read_plan(plan) if plan.is_file() else None
        if self.partial.is_symlink():
            is_other = True
        elif known is None:
            # a run that was killed at the start has left at most its notes
            is_other = self.partial.exists() and not _holds_at_most_notes(self.partial)
        else:
            is_other = known != self._task and known.get(_CAN_BE_TAKEN_UP, True)
        if is_other:
            raise ValueError(
                f"{self.partial} contains unfinished work of another merge, with another adapter, base or option. "
                "Rerun that command to finish it, or remove the directory."
            )
        return self._can_be_taken_up and known == self._task

    @contextmanager
    def open(self) -> Iterator[None]:
        """Creates the directory or resumes work in it, and excludes concurrent runs while in the context.

        Raises:
            ValueError: another run is writing the directory, or has written it since this object was created.
        """
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(WeakFileLock(self._lock, timeout=0.1))
            except Timeout as error:
                raise ValueError(
                    f"Another run is writing {self.partial}. Wait for it, or stop it. If no other run exists, remove "
                    f"{self._lock}."
                ) from error
            # checked again under the lock
            if not self._check():
                self._clear()
            for left in self.partial.rglob("*.writing"):
                left.unlink()
            self.write_note(_PLAN, self._task)
            try:
                yield
            except BaseException:
                if not self._can_be_taken_up:
                    self.discard()
                raise
            if not self.partial.exists():
                # after the rename: a run that still acquires the lock finds a non-empty directory. Windows removes
                # the lock file itself
                with suppress(PermissionError):
                    self._lock.unlink(missing_ok=True)

    def _clear(self) -> None:
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir()

    def place(self, name: str) -> Path:
        """Path of a file of the result.

        Raises:
            ValueError: the name is not a plain file name inside the directory.
        """
        if not is_plain_name(name):
            raise ValueError(
                f"{name!r} is not a plain file name inside {self.directory}. Rename the file in the base's checkpoint."
            )
        return self.partial / name

    def is_written(self, name: str) -> bool:
        return self.place(name).is_file()

    def path_to_write(self, name: str) -> Path:
        """Path to write a file to; call `written` when it is complete."""
        path = _unfinished(self.place(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def written(self, name: str) -> None:
        """Renames a completely written file to its final name, after a sync to disk."""
        _finish(self.place(name))

    def write_json(self, name: str, values: Any) -> None:
        write_json(self.place(name), values)

    def write_text(self, name: str, text: str) -> None:
        self.path_to_write(name).write_text(text, encoding="utf-8")
        self.written(name)

    def write_note(self, name: str, values: Any) -> None:
        """Writes JSON values that are needed to resume the work and are not part of the result."""
        write_json(self._note(name), values)

    def read_note(self, name: str) -> Any:
        """Reads the JSON values written by `write_note`; None if there are none."""
        file = self._note(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _note(self, name: str) -> Path:
        self.place(name)  # rejects names that are not plain
        return self.partial / _NOTES / name

    def finish(self) -> None:
        """Renames the partial directory to its final name."""
        _sync_directory(self.partial)
        if self.directory.exists():
            self.directory.rmdir()
        os.replace(self.partial, self.directory)
        # removed last, so a run that was killed before can be resumed
        shutil.rmtree(self.directory / _NOTES)

    def discard(self) -> None:
        """Removes unfinished work that a rerun could not finish either."""
        shutil.rmtree(self.partial, ignore_errors=True)


def write_json(file: Path, values: Any) -> None:
    """Writes JSON values to a file atomically; a link with its name is replaced."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _unfinished(file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _finish(file)


def _unfinished(file: Path) -> Path:
    return file.with_name(f"{file.name}.writing")


def _finish(file: Path) -> None:
    with _unfinished(file).open("rb+") as written:  # Windows syncs only files that are open for writing
        os.fsync(written.fileno())
    os.replace(_unfinished(file), file)


def _sync_directory(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows neither supports nor requires this
        return
    descriptor = os.open(path, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds_at_most_notes(directory: Path) -> bool:
    return directory.is_dir() and all(path.name == _NOTES for path in directory.iterdir())


def _read_plan(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is unreadable: {error}. Expected the plan of an interrupted merge. Remove {file.parent.parent} "
            "and rerun the merge."
        ) from error
