"""The benchmark of storages runs from end to end with few steps, and its gaps and comparisons are correct."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
STORAGES = ["fp8/128x128", "mxfp4"]


def run_storages(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "storages.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storages")


@pytest.fixture(scope="module")
def printed(folder) -> str:
    quick = ["--base-steps", 3, "--steps", 4, "--held-out", 2, "--storages", *STORAGES]
    files = ["--json", folder / "storages.json", "--plot", folder / "storages.png"]
    result = run_storages(*quick, *files, "--directory", folder / "kept")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def rows(folder, printed) -> list[dict]:
    return json.loads((folder / "storages.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture
def storages(monkeypatch):
    """The benchmark's module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER.parent / "examples"))
    import storages

    return storages


def test_every_storage_is_trained_and_merged_back(rows, printed):
    assert [row["storage"] for row in rows] == ["16 bits", *STORAGES]
    for row in rows:
        assert len(row["training"]) == 4
        assert list(row["held_out"]) == ["0", "1", "2", "3", "4"]
        assert row["storage"] in printed
    assert rows[0]["expert_bytes"] > 1.9 * rows[1]["expert_bytes"] > 3 * rows[2]["expert_bytes"]
    assert rows[0]["merges"] == {}
    for row in rows[1:]:
        assert row["largest_gap"] > 0
        assert row["held_out_gap"] == row["held_out"]["4"] - rows[0]["held_out"]["4"]
        assert row["merges"].keys() == {"nearest", "second-order"}
        assert 0 <= row["rerouted"] < 1
        for merge in row["merges"].values():
            assert 0 < merge["kl"] < row["kl_of_base"]
            assert merge["kl_of_experts"] > 0


def test_merges_go_onto_a_base_in_the_storage(folder, printed):
    for name in ("fp8-128x128", "mxfp4"):
        config = json.loads((folder / "kept" / f"base-{name}" / "config.json").read_text(encoding="utf-8"))
        assert config["quantization_config"]["quant_method"] == "peft_moe_qlora"
        assert (folder / "kept" / f"adapter-{name}" / "adapter_model.safetensors").is_file()


def test_plot_is_drawn(folder, printed):
    picture = (folder / "storages.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_unknown_storages_are_rejected():
    result = run_storages("--storages", "mxfp4", "nf5/64")
    assert result.returncode == 2
    assert "unknown formats: nf5/64" in result.stderr


def test_gap_is_the_absolute_difference_of_smoothed_losses(storages):
    baseline = storages.Run("16 bits", 0, [4.0] * 40, {40: 3.0})
    # one loss that is lower by 2 counts by a twentieth, at the beginning by more
    for step, gap, at in ((30, 2 / 20, 30), (4, 2 / 4, 4)):
        training = [4.0] * 40
        training[step - 1] = 2.0
        run = storages.Run("mxfp4", 0, training, {40: 3.25})
        run.compare(baseline)
        assert run.largest_gap == pytest.approx(gap)
        assert (run.gap_at, run.held_out_gap) == (at, 0.25)


def test_different_initial_factors_are_detected(storages, folder, printed):
    kept = folder / "kept"
    args = storages.parse_arguments(["--steps", "1", "--held-out", "1", "--directory", str(kept)])
    args.base = kept / "base"
    windows = torch.zeros(8, 8, dtype=torch.long)
    initial = {"base_model.no_layer.lora_A.default.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="differ from those of the first storage"):
        storages.train(args, "mxfp4", storages.quickstart.Windows(windows, windows), initial)


def test_tokens_with_equal_routing(storages):
    logits = torch.randn(3, 5)
    experts = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[1, 2], [2, 3]]])
    left = storages.Said(logits, experts)
    other = logits.clone()
    other[1] += torch.arange(5)
    changed = experts.clone()
    changed[1, 1] = torch.tensor([0, 3])
    right = storages.Said(other, changed)
    is_alike = left.is_routed_as(right)
    assert is_alike.tolist() == [True, False, True]
    assert left.kl(right, is_alike) == pytest.approx(0, abs=1e-12)
    expected = (logits[1].softmax(0) * (logits[1].log_softmax(0) - other[1].log_softmax(0))).sum().item() / 3
    assert left.kl(right) == pytest.approx(expected, rel=1e-5)
