"""Interrupted merges on disk: an incomplete result never looks complete, and completed files are reused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from checkpoint_writers import read_tensors, write_tensors
from merged_checkpoints import merge, save_adapter
from safetensors.torch import load_file, save_file

from peft_moe_qlora.layouts import ReadOptions, convert_adapter
from peft_moe_qlora.merge import checkpoint as merging

KILLED = """
    import sys, time
    import peft_moe_qlora
    from peft_moe_qlora.merge import merge_checkpoint
    from peft_moe_qlora.merge import checkpoint as merge
    directory = sys.argv[1]
    written = merge.save_file
    def slowly(tensors, path, metadata):  # so that there is a time to be killed at
        written(tensors, path, metadata)
        with open(path, "r+b") as file:
            whole = file.read()
            file.truncate(len(whole) // 2)
            file.flush()
            time.sleep(0.3)
            file.seek(0)
            file.write(whole)
    merge.save_file = slowly
    print("started", flush=True)
    merge_checkpoint(f"{directory}/base", f"{directory}/adapter", f"{directory}/merged", progressbar=False)
"""


def test_merge_killed_at_any_point_is_resumed(tmp_path):
    """The incomplete result cannot be loaded, and a later run completes it."""
    save_adapter(tmp_path)
    write_tensors(tmp_path / "base", read_tensors(tmp_path / "base"), num_shards=12)
    merge(tmp_path, out="expected")
    expected = read_tensors(tmp_path / "expected")
    generator = random.Random(0)
    kills = finished = 0
    while not finished:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "started\n"
        if kills < 4:
            time.sleep(generator.uniform(0.2, 1.0))
            process.send_signal(signal.SIGKILL)
        finished = process.wait(timeout=120) == 0
        process.stdout.close()
        kills += not finished
        if not finished:
            assert not (tmp_path / "merged").exists()
            assert not (tmp_path / "merged.partial" / "config.json").exists()
            for file in (tmp_path / "merged.partial").glob("*.safetensors"):
                assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(file).items())
    assert kills
    found = read_tensors(tmp_path / "merged")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("merged", "expected")]
    assert names[0] == names[1]


def test_concurrent_merges_are_rejected(tmp_path, monkeypatch):
    """Each would take the other's unfinished files for its own."""
    save_adapter(tmp_path)
    write_tensors(tmp_path / "base", read_tensors(tmp_path / "base"), num_shards=2)
    merge(tmp_path, out="expected")
    save_file, refused = merging.save_file, []

    def while_another_starts(*args):
        with pytest.raises(ValueError, match=r"Another run is writing .*merged\.partial\. Wait for it"):
            merge(tmp_path)
        refused.append(args)
        save_file(*args)

    monkeypatch.setattr(merging, "save_file", while_another_starts)
    merge(tmp_path)
    assert len(refused) == 2
    expected, found = (read_tensors(tmp_path / name) for name in ("expected", "merged"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        path.name for path in (tmp_path / "expected").iterdir()
    }


FULL = """
    import resource, signal, sys
    import peft_moe_qlora
    from peft_moe_qlora.merge import merge_checkpoint
    directory = sys.argv[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        merge_checkpoint(f"{directory}/base", f"{directory}/adapter", f"{directory}/merged", progressbar=False)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_full_disk(tmp_path):
    """The system refuses to let a file grow, as a full disk would."""
    save_adapter(tmp_path)
    write_tensors(tmp_path / "base", read_tensors(tmp_path / "base"), num_shards=3)
    largest = max(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path), str(largest // 2)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.startswith("OSError")
    assert "File too large" in output
    assert "Free disk space, then rerun the same command to resume" in output
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "merged.partial" / "config.json").exists()
    merge(tmp_path)
    assert (tmp_path / "merged" / "config.json").is_file()


def test_insufficient_disk_space(tmp_path, monkeypatch):
    """Reported before the work, with nothing written."""
    save_adapter(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"GB of free disk space, but the merged checkpoint requires"):
        merge(tmp_path)
    assert not (tmp_path / "merged.partial").exists()


def interrupted(directory, monkeypatch) -> None:
    """A merge that wrote the first of three files."""
    write_tensors(directory / "base", read_tensors(directory / "base"), num_shards=3)
    written = merging.save_file

    def fail_at_second_shard(tensors, path, metadata):
        if "00002" in str(path):
            raise OSError("no space left on device")
        written(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "save_file", fail_at_second_shard)
        with pytest.raises(OSError, match="no space left"):
            merge(directory)


def test_only_unwritten_files_require_disk_space(tmp_path, monkeypatch):
    """Files of an interrupted run don't count, and the others count with their size in the new dtype."""
    save_adapter(tmp_path)
    interrupted(tmp_path, monkeypatch)
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    left = sum(file.stat().st_size for file in files[1:])
    assert left < sum(file.stat().st_size for file in files)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=left))
        merge(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=left * 0.8))
        merge(tmp_path, out="half", dtype=torch.bfloat16)
        with pytest.raises(OSError, match="GB of free disk space"):
            merge(tmp_path, out="whole")


def test_unfinished_files_are_not_in_the_result(tmp_path, monkeypatch):
    """A file that a killed run was writing, whatever its name."""
    save_adapter(tmp_path)
    interrupted(tmp_path, monkeypatch)
    (tmp_path / "merged.partial" / "tokenizer.json.writing").write_text("hal")
    merge(tmp_path)
    assert not list((tmp_path / "merged").rglob("*.writing"))
    assert not list((tmp_path / "merged").rglob("*.result.json"))
    assert not (tmp_path / "merged" / "unfinished.json").exists()


def test_unknown_weights_are_not_reused(tmp_path):
    """A folder of that name from another source is not changed."""
    save_adapter(tmp_path)
    (tmp_path / "merged.partial").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "merged.partial" / "model.safetensors")
    with pytest.raises(ValueError, match="contains unfinished work of another merge"):
        merge(tmp_path)
    assert (tmp_path / "merged.partial" / "model.safetensors").is_file()


def test_written_file_without_a_tensor(tmp_path, monkeypatch):
    """Whatever failed while writing, the file on disk is checked before it counts as finished."""
    save_adapter(tmp_path)

    def save_without_norm(tensors, path, metadata):
        save_file({key: tensor for key, tensor in tensors.items() if key != "model.norm.weight"}, path, metadata)

    monkeypatch.setattr(merging, "save_file", save_without_norm)
    with pytest.raises(ValueError, match=r"inconsistent for model\.norm\.weight: .* the result has no such tensor"):
        merge(tmp_path)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize(
    "changed", ["option", "dtype", "reading", "version", "adapter", "adapter's config", "base", "base's config"]
)
def test_unfinished_work_of_another_merge_is_not_reused(changed, tmp_path, monkeypatch):
    """Files of two merges in one directory would be a model that was never trained."""
    save_adapter(tmp_path)
    if changed == "reading":  # this package's adapters contain their reading options
        convert_adapter(tmp_path / "adapter", tmp_path / "of PEFT", "peft-lora")
        shutil.rmtree(tmp_path / "adapter")
        (tmp_path / "of PEFT").rename(tmp_path / "adapter")
    interrupted(tmp_path, monkeypatch)
    options = {}
    if changed == "option":
        options = {"onto": "base"}
    elif changed == "dtype":
        options = {"dtype": torch.bfloat16}
    elif changed == "reading":
        options = {"options": ReadOptions(quant_type="nf4")}
    elif changed == "version":
        monkeypatch.setattr(merging, "__version__", "0.0.1")
    elif changed == "base":
        os.utime(tmp_path / "base" / "model-00002-of-00003.safetensors", (1, 1))
    elif changed == "adapter":
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({key: tensor * 2 for key, tensor in load_file(file).items()}, file)
    else:
        of_base = changed == "base's config"
        file = tmp_path / ("base/config.json" if of_base else "adapter/adapter_config.json")
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, **({"rope_theta": 5.0} if of_base else {"lora_alpha": 80})}))
    with pytest.raises(ValueError, match=r"merged\.partial contains unfinished work of another merge"):
        merge(tmp_path, **options)


def test_interrupted_merge_is_completed(tmp_path, monkeypatch):
    """Existing files are kept, and the report is that of an uninterrupted run."""
    save_adapter(tmp_path)
    interrupted(tmp_path, monkeypatch)
    first = next((tmp_path / "merged.partial").glob("*-00001-*.safetensors"))
    time_of_first = first.stat().st_mtime_ns
    report = merge(tmp_path)
    assert (tmp_path / "merged" / first.name).stat().st_mtime_ns == time_of_first
    again = merge(tmp_path, out="at-once")
    assert report == dataclasses.replace(again)
    (tmp_path / "third.partial").mkdir()  # of a run that was killed at its very start
    merge(tmp_path, out="third")
