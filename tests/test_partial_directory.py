"""The directory of a merge appears atomically, also with concurrent runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from peft_moe_qlora.merge.partial_directory import PartialDirectory

TASK = {"adapter": "a"}


def write(output: PartialDirectory, text: str = "whole") -> None:
    output.path_to_write("model.safetensors").write_text(text)
    output.written("model.safetensors")


def interrupted(output: PartialDirectory) -> None:
    write(output)
    raise KeyboardInterrupt


def found(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.mark.parametrize("moment", ["sync", "replace"])
@pytest.mark.parametrize("task", [TASK, {"adapter": "b"}], ids=["same task", "another task"])
def test_second_run_at_the_end_of_the_first(moment, task, tmp_path, monkeypatch):
    """It would clear the files before the first run renames them, and the first would report success."""
    first = PartialDirectory(tmp_path / "merged", TASK, can_be_taken_up=False)
    second = PartialDirectory(tmp_path / "merged", task, can_be_taken_up=False)
    kept_out = []

    def meanwhile(path: Path) -> None:
        if Path(path) == first.partial:
            with pytest.raises(ValueError, match=r"Another run is writing .*merged\.partial"), second.open():
                pass
            kept_out.append(path)

    # the calls that sync the directory to disk, and that give it its name
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), first.partial.stat()):
            meanwhile(first.partial)
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        meanwhile(source)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync" if moment == "sync" else "replace", fsync if moment == "sync" else replace)
    with first.open():
        write(first)
        first.finish()
    assert len(kept_out) == 1
    assert found(tmp_path / "merged") == {"model.safetensors": "whole"}
    assert os.listdir(tmp_path) == ["merged"]


def test_second_run_right_after_the_first(tmp_path):
    """It was created before the directory existed."""
    first, second = (PartialDirectory(tmp_path / "merged", TASK) for _ in range(2))
    with first.open():
        write(first)
        first.finish()
    with pytest.raises(ValueError, match="merged is not empty"), second.open():
        pass
    assert found(tmp_path / "merged") == {"model.safetensors": "whole"}
    assert not (tmp_path / "merged.partial").exists()


def test_other_task_created_before_the_first_was_interrupted(tmp_path):
    """The second must not clear the files that the first completed."""
    first, second = PartialDirectory(tmp_path / "merged", TASK), PartialDirectory(tmp_path / "merged", {"other": 1})
    with pytest.raises(KeyboardInterrupt), first.open():
        interrupted(first)
    with pytest.raises(ValueError, match="contains unfinished work of another merge"), second.open():
        pass
    again = PartialDirectory(tmp_path / "merged", TASK)
    with again.open():
        assert again.is_written("model.safetensors")
        again.finish()
    assert found(tmp_path / "merged") == {"model.safetensors": "whole"}


@pytest.mark.parametrize("name", ["notes.txt", "folder/notes.txt"])
def test_existing_folder_of_another_source(name, tmp_path):
    """Its contents are kept."""
    file = tmp_path / "merged.partial" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match="contains unfinished work of another merge"):
        PartialDirectory(tmp_path / "merged", TASK)
    assert file.read_text() == "mine"


def test_link_in_place_of_the_folder(tmp_path):
    """Nothing is written through it, and its target is not cleared."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "merged.partial").symlink_to("elsewhere")
    with pytest.raises(ValueError, match="contains unfinished work of another merge"):
        PartialDirectory(tmp_path / "merged", TASK)


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "", "a//b", "C:out", "a\\b", ".lock", "a/.b"])
def test_names_outside_the_directory(name, tmp_path):
    output = PartialDirectory(tmp_path / "merged", TASK)
    for do in (output.path_to_write, output.written, output.is_written, output.read_note):
        with pytest.raises(ValueError, match="not a plain file name inside"):
            do(name)
    for write_to in (output.write_json, output.write_note):
        with pytest.raises(ValueError, match="not a plain file name inside"):
            write_to(name, {})
    assert not list(tmp_path.iterdir())


def test_systems_that_cannot_open_directories(tmp_path, monkeypatch):
    """Windows cannot sync a directory, nor a file that isn't open for writing."""
    real_open, real_fsync, writable = os.open, os.fsync, []

    def open_file(path, flags, *args, **kwargs):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, flags, *args, **kwargs)

    def fsync(descriptor: int) -> None:
        os.write(descriptor, b"")  # fails if it isn't open for writing
        writable.append(descriptor)
        real_fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.delattr(os, "O_DIRECTORY")
        patch.setattr(os, "open", open_file)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(shutil, "_use_fd_functions", False)
        output = PartialDirectory(tmp_path / "merged", TASK)
        with output.open():
            write(output)
            output.finish()
    assert len(writable) == 2
    assert found(tmp_path / "merged") == {"model.safetensors": "whole"}
