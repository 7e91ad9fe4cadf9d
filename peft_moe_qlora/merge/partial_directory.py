"""A directory that appears when everything in it is written, and not before."""

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
"""Folder of what is needed for taking up work; nothing of a checkpoint is in a hidden folder."""
_PLAN = "plan.json"
_CAN_BE_TAKEN_UP = "can_be_taken_up"


class PartialDirectory:
    """Files are written to `DIRECTORY.partial`, which has no config.json and so can't be loaded, and is renamed last.

    What an interrupted run has finished is kept for the next one of the same task. Runs keep each other out by a lock
    beside the directory, `.DIRECTORY.lock`, which is held until the directory has appeared.

    Args:
        directory: what is to appear; must not be there, or be empty.
        task: what identifies the work, as plain data.
        can_be_taken_up: whether a later run can use what an earlier one of the same task has left.

    Raises:
        ValueError: the directory holds something, can't be renamed to, or has unfinished work of another task.
    """

    def __init__(self, directory: str | Path, task: Mapping[str, Any], can_be_taken_up: bool = True) -> None:
        self.directory = Path(directory).resolve()
        self.partial = self.directory.with_name(f"{self.directory.name}.partial")
        self._lock = self.directory.with_name(f".{self.directory.name}.lock")
        self._can_be_taken_up = can_be_taken_up
        self._task = dict(task) if can_be_taken_up else {**task, _CAN_BE_TAKEN_UP: False}
        if self.directory.is_mount():
            raise ValueError(
                f"{self.directory} is a mount point, which nothing can be renamed to; name a folder in it."
            )
        self._check()

    def _check(self) -> bool:
        """Whether what an earlier run has left is of use.

        Raises:
            ValueError: the directory is there, or its place is taken by other work.
        """
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            what = "there already and not empty. If it is a finished merge, nothing is left to do"
            raise ValueError(
                f"{self.directory} is {what if self.directory.is_dir() else 'a file'}; name another directory, or "
                "remove it."
            )
        plan = self.partial / _NOTES / _PLAN
        known = _read_plan(plan) if plan.is_file() else None
        if self.partial.is_symlink():
            is_other = True
        elif known is None:
            # a run that was killed at its very start has left no more than its notes
            is_other = self.partial.exists() and not _holds_at_most_notes(self.partial)
        else:
            is_other = known != self._task and known.get(_CAN_BE_TAKEN_UP, True)
        if is_other:
            raise ValueError(
                f"{self.partial} holds unfinished work of another merge: another adapter, base or option. Finish that "
                "with the same command, or remove the directory."
            )
        return self._can_be_taken_up and known == self._task

    @contextmanager
    def open(self) -> Iterator[None]:
        """Creates the directory, or takes up what is there, and keeps other runs away while in the context.

        Raises:
            ValueError: another run is at it, or has been since this object was made.
        """
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(WeakFileLock(self._lock, timeout=0.1))
            except Timeout as error:
                raise ValueError(
                    f"Another run is writing {self.partial}. Wait for it, or stop it. If there is none, remove "
                    f"{self._lock}."
                ) from error
            # again, now that nobody else can change it
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
                # only now: who still gets hold of it finds the directory full. Windows removes it by itself
                with suppress(PermissionError):
                    self._lock.unlink(missing_ok=True)

    def _clear(self) -> None:
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir()

    def place(self, name: str) -> Path:
        """Where a file of the result is.

        Raises:
            ValueError: the name is none inside the directory.
        """
        if not is_plain_name(name):
            raise ValueError(f"{name!r} can't be written: it is not a plain file name in {self.directory}.")
        return self.partial / name

    def is_written(self, name: str) -> bool:
        return self.place(name).is_file()

    def path_to_write(self, name: str) -> Path:
        """Where to write a file; it counts as written after `written`."""
        path = _unfinished(self.place(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def written(self, name: str) -> None:
        """Gives a file its name, once it is on the disk."""
        _finish(self.place(name))

    def write_json(self, name: str, values: Any) -> None:
        write_json(self.place(name), values)

    def write_note(self, name: str, values: Any) -> None:
        """Writes plain data that a run needs which takes up the work, and that is no part of the result."""
        write_json(self._note(name), values)

    def read_note(self, name: str) -> Any:
        """What `write_note` has written; None if it hasn't."""
        file = self._note(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _note(self, name: str) -> Path:
        self.place(name)  # refuses what is no plain name
        return self.partial / _NOTES / name

    def finish(self) -> None:
        """Lets the directory appear."""
        _sync_directory(self.partial)
        if self.directory.exists():
            self.directory.rmdir()
        os.replace(self.partial, self.directory)
        # last, so that a run that is killed before is taken up
        shutil.rmtree(self.directory / _NOTES)

    def discard(self) -> None:
        """Removes unfinished work that no other run could finish either."""
        shutil.rmtree(self.partial, ignore_errors=True)


def write_json(file: Path, values: Any) -> None:
    """Writes plain data such that the file is there whole or not at all; a link of its name is replaced."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _unfinished(file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _finish(file)


def _unfinished(file: Path) -> Path:
    return file.with_name(f"{file.name}.writing")


def _finish(file: Path) -> None:
    with _unfinished(file).open("rb+") as written:  # Windows syncs only what is open for writing
        os.fsync(written.fileno())
    os.replace(_unfinished(file), file)


def _sync_directory(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows can't open one, and needs it not
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
            f"{file} can't be read ({error}); the plan of an interrupted merge was expected. Remove "
            f"{file.parent.parent}."
        ) from error
