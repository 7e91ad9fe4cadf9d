"""The multi-GPU benchmark runs from end to end on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_training import cpu_environment
from packaging.version import Version

from peft_moe_qlora.training.fsdp2 import OLDEST_TORCH

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def in_process(monkeypatch) -> None:
    """Lets a test import the benchmark's modules."""
    monkeypatch.syspath_prepend(str(FOLDER))


def test_all_modes(tmp_path):
    import torch

    has_fsdp2 = Version(Version(torch.__version__).base_version) >= Version(OLDEST_TORCH)
    modes = ["one", "ddp", *(["fsdp2"] if has_fsdp2 else []), "load-part", "load-whole"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        str(FOLDER / "distributed.py"),
        "--modes",
        *modes,
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--tokens",
        "16",
    ]
    command += ["--steps", "1", "--warmup", "1", "--checkpoint", str(tmp_path / "base"), "--json"]
    command += [str(tmp_path / "found" / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=cpu_environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "found" / "rows.json").read_text())
    rows = {row["mode"]: row for row in found["rows"]}
    assert list(rows) == modes
    assert all(mode in done.stdout for mode in modes)
    assert [row["processes"] for row in rows.values()] == [1] + [2] * (len(modes) - 1)
    trainings = [row for mode, row in rows.items() if not mode.startswith("load")]
    # the first process has the same weights and tokens in every mode, until it receives the others' gradients
    assert [row["loss"] for row in trainings] == pytest.approx([rows["one"]["loss"]] * len(trainings), abs=0.05)
    for row in trainings:
        assert row["tokens_per_second"] == pytest.approx(row["processes"] * 16e3 / row["milliseconds"])
    assert rows["ddp"]["resident_gib"] == rows["one"]["resident_gib"]
    if has_fsdp2:
        assert rows["fsdp2"]["resident_gib"] == pytest.approx(rows["one"]["resident_gib"] / 2, rel=0.02)


def test_slowest_time_and_largest_memory_are_reported():
    from distributed import Row, report, slowest

    of_ranks = [Row("ddp", 1, 10.0, None, 2.0, 3.0, 1.0, 0.5), Row("ddp", 1, 12.0, None, 1.0, 4.0, 1.0, 0.7)]
    row = slowest(of_ranks, 2)
    assert row == Row("ddp", 2, 12.0, None, 2.0, 4.0, 1.0, 0.5)
    row.tokens_per_second = 300.0
    lines = report([Row("one", 1, 9.0, 150.0, 4.0, 5.0, 1.0, 0.5), row], 16, 2).splitlines()
    assert lines[-1].split() == ["ddp", "2", "12.00", "300.00", "2.00", "2.00", "0.50", "4.00", "1.00", "0.50"]


def test_layers_share_memory_until_copied():
    from step_models import build
    from step_settings import Plan, parse_arm

    plan = Plan("tiny", parse_arm("ours", "nf4/64"), dtype="float32")
    models = build(plan), build(plan, share_experts=True)
    for model, is_shared in zip(models, (False, True)):
        first, second = (layer.mlp.experts.down_proj.base_layer.codes for layer in model.get_base_model().model.layers)
        assert first is not second
        assert (first.data_ptr() == second.data_ptr()) == is_shared
    found, expected = (dict(model.named_parameters()) for model in models)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(one) for name, one in expected.items())


def test_loading_requires_a_directory(capsys):
    from distributed import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(["--modes", "load-part"])
    assert "Loading modes require --checkpoint" in capsys.readouterr().err
