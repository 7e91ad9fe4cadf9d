"""The quickstart runs from end to end, with few training steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.py"


def run_quickstart(*arguments: str) -> str:
    command = [sys.executable, str(QUICKSTART), "--steps", "3", *arguments]
    # with --model it leaves the number of threads to torch, which is slow on a busy machine
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def printed(output) -> str:
    return run_quickstart("--base-steps", "3", "--output", str(output))


def test_quickstart_trains_saves_reloads_and_merges(output, printed):
    for row in ("base, 4-bit experts", "adapted, 16-bit experts", "reloaded in a fresh process", "merged into nf4"):
        assert row in printed
    assert (output / "loss.png").stat().st_size > 10_000
    assert (output / "adapter-4-bit" / "adapter_model.safetensors").is_file()


def test_base_is_stored_like_a_hub_checkpoint(output, printed):
    with safe_open(output / "base" / "model.safetensors", framework="pt") as checkpoint:
        assert "model.layers.0.mlp.experts.3.gate_proj.weight" in checkpoint.keys()  # noqa: SIM118 - not a dict


def test_quickstart_adapts_a_given_model(output, printed, tmp_path):
    text = run_quickstart("--model", str(output / "base"), "--output", str(tmp_path), "--skip-16bit")
    assert "adapted, 4-bit experts" in text
    assert "adapted, 16-bit experts" not in text
