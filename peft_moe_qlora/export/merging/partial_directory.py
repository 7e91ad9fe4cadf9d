"""A directory that appears when everything in it is written, and not before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock

_PLAN = "unfinished.json"
_LOCK = ".lock"
_CAN_BE_TAKEN_UP = "can_be_taken_up"
PICKLED = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
"""Ends of names of weights in other formats than safetensors."""

_WEIGHTS = (".safetensors", ".index.json", *PICKLED)


class PartialDirectory:
    """Files are written to `DIRECTORY.partial`, which has no config.json and so can't be loaded, and is renamed last.

    What an interrupted run has finished is kept for the next one of the same task.

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
        self._check_free()
        if self.directory.is_mount():
            raise ValueError(
                f"{self.directory} is a mount point, which nothing can be renamed to; name a folder in it."
            )
        plan = self.partial / _PLAN
        known = _read_plan(plan) if plan.is_file() else None
        self._can_be_taken_up = can_be_taken_up
        self._is_of_use = can_be_taken_up and known == task
        # a run that was killed at its very start has left nothing but the folder
        if known is None:
            holds_work = self.partial.exists() and any(self.partial.rglob("*.safetensors"))
        else:
            holds_work = known != task and known.get(_CAN_BE_TAKEN_UP, True)
        if holds_work:
            raise ValueError(
                f"{self.partial} holds unfinished work of another merge: another adapter, base or option. Finish that "
                "with the same command, or remove the directory."
            )
        self.task = task if can_be_taken_up else {**task, _CAN_BE_TAKEN_UP: False}

    def _check_free(self) -> None:
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            what = "there already and not empty. If it is a finished merge, nothing is left to do"
            raise ValueError(
                f"{self.directory} is {what if self.directory.is_dir() else 'a file'}; name another directory, or "
                "remove it."
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Creates the directory, or takes up what is there, and keeps other runs away while in the context.

        Raises:
            ValueError: another run is at it, or has just finished.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        try:
            with WeakFileLock(self.partial / _LOCK, timeout=0.1):
                self._check_free()
                if not self._is_of_use:
                    self._clear()
                for left in self.partial.rglob("*.writing"):
                    left.unlink()
                self.write_json(_PLAN, self.task)
                try:
                    yield
                except BaseException:
                    if not self._can_be_taken_up:
                        self.discard()
                    raise
        except Timeout as error:
            raise ValueError(f"Another run is writing {self.partial}. Wait for it, or stop it.") from error

    def _clear(self) -> None:
        for left in self.partial.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != _LOCK:
                left.unlink()

    def is_written(self, name: str) -> bool:
        return (self.partial / name).is_file()

    def path_to_write(self, name: str) -> Path:
        """Where to write a file; it counts as written after `written`."""
        path = self.partial / f"{name}.writing"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def written(self, name: str) -> None:
        """Gives a file its name, once it is on the disk."""
        path = self.partial / f"{name}.writing"
        _sync(path)
        os.replace(path, self.partial / name)

    def write_json(self, name: str, values: Any) -> None:
        self.path_to_write(name).write_text(json.dumps(values, indent=2) + "\n")
        self.written(name)

    def read_json(self, name: str) -> Any:
        return json.loads((self.partial / name).read_text())

    def copy_beside(self, source: Path, changed: Mapping[str, Any]) -> None:
        """Copies everything of a checkpoint that isn't weights.

        Args:
            source: directory of the checkpoint.
            changed: name -> plain data, of files to be written instead.
        """
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source)
            is_hidden = any(part.startswith(".") for part in name.parts)
            is_own = self.partial in path.resolve().parents or path.name.startswith("adapter_")
            if is_own or is_hidden or path.name.endswith(_WEIGHTS) or str(name) in changed:
                continue
            if path.is_file():
                shutil.copyfile(path, self.path_to_write(str(name)))
                self.written(str(name))
        for name, values in changed.items():
            self.write_json(name, values)

    def finish(self, scraps: list[str]) -> None:
        """Removes what was needed for taking up work, and lets the directory appear.

        Args:
            scraps: names of such files.
        """
        for name in (*scraps, _LOCK):
            (self.partial / name).unlink(missing_ok=True)
        _sync(self.partial)
        if self.directory.exists():
            self.directory.rmdir()
        os.replace(self.partial, self.directory)
        # last, so that a run that is killed before is taken up
        (self.directory / _PLAN).unlink()

    def discard(self) -> None:
        """Removes unfinished work that no other run could finish either."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _read_plan(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} can't be read ({error}); what an interrupted merge has to do was expected. Remove {file.parent}."
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
