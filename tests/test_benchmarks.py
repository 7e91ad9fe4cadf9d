"""The layer benchmark runs from end to end on a CPU, and its comparison with fp32 finds errors."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
SHAPES = ["tiny", "tiny-gpt-oss"]
ARMS = [
    "transformers",
    "peft",
    "ours-bf16",
    "ours-nf4",
    "ours-nf4-nested",
    "ours-fp8",
    "ours-int8",
    "ours-mxfp4",
    "ours-int4",
    "ours-nvfp4",
]
TOKENS = [1, 9]
MODES = ["fwd", "fwd+bwd", "fwd+bwd+ckpt"]


def run_layer(*arguments: object) -> str:
    command = [sys.executable, str(FOLDER / "layer.py"), "--device", "cpu", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def printed(folder) -> str:
    quick = ["--repeats", 1, "--warmup", 1, "--input-sets", 2]
    files = ["--json", folder / "layer.json", "--plot", folder / "layer.png"]
    return run_layer("--shapes", *SHAPES, "--tokens", *TOKENS, *quick, *files)


@pytest.fixture(scope="module")
def results(folder, printed) -> dict:
    return json.loads((folder / "layer.json").read_text())


@pytest.fixture
def in_process(monkeypatch):
    """Lets a test import the benchmark's modules."""
    monkeypatch.syspath_prepend(str(FOLDER))


def test_every_combination_is_timed(results, printed):
    found = [(row["shape"], row["arm"], row["tokens"], row["mode"]) for row in results["rows"]]
    assert sorted(found) == sorted(itertools.product(SHAPES, ARMS, TOKENS, MODES))
    for row in results["rows"]:
        assert row["ms"] > 0
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["peak_mib"] is row["held_mib"] is row["graph_ms"] is None
        assert row["note"] == ""
    assert {"torch", "transformers", "peft"} <= results["versions"].keys()
    assert all(name in printed for name in (*SHAPES, *ARMS, "/ transformers", "/ peft"))


def test_every_arm_is_compared_with_fp32(results):
    found = [(check["shape"], check["arm"], check["tokens"]) for check in results["checks"]]
    assert sorted(found) == sorted(itertools.product(SHAPES, ARMS, TOKENS))
    for check in results["checks"]:
        names = {"output", "output, no_grad", "hidden_states", "top_k_weights"}
        if check["arm"] != "transformers":
            names |= {f"{projection} {factor}" for projection in ("gate_up_proj", "down_proj") for factor in "AB"}
        assert check["errors"].keys() == names
        # sums of so few terms may cancel; rounding then has more effect than in a real layer
        assert max(check["errors"].values()) < 5e-2


def test_stored_weights_are_reported(results):
    mib = {layer["arm"]: layer["weights_mib"] for layer in results["layers"] if layer["shape"] == "tiny"}
    assert mib["transformers"] == mib["peft"] == mib["ours-bf16"]
    assert mib["ours-nf4-nested"] < mib["ours-nf4"] < 0.3 * mib["ours-bf16"]


def test_plot_is_drawn(folder, printed):
    picture = (folder / "layer.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_budget_stops_and_imported_rows_are_shown(folder, results):
    rows = [row for row in results["rows"] if row["arm"] in ("transformers", "ours-nf4")]
    peer = {"shape": "tiny", "arm": "another package", "tokens": 9, "mode": "fwd", "ms": 1e3, "unknown": 1}
    (folder / "peers.json").write_text(json.dumps({"device": "some device", "rows": [*rows, peer]}))
    arguments = [
        "--shapes",
        "tiny",
        "--budget",
        0,
        "--peer-json",
        folder / "peers.json",
        "--json",
        folder / "none.json",
    ]
    printed = run_layer(*arguments)
    assert "Not started, out of time:\ntiny, transformers: all" in printed
    assert "another package: measured on some device" in printed
    found = json.loads((folder / "none.json").read_text())
    assert found["rows"] == []
    assert len(found["skipped"]) == len(ARMS)


def test_conflicting_names_get_the_file_as_suffix(in_process, folder, results):
    from results import load_rows

    rows = load_rows([folder / "layer.json"], taken=["peft"])
    assert {row.arm for row in rows} == {*ARMS, "peft (layer)"} - {"peft"}
    (folder / "bad.json").write_text(json.dumps({"rows": [{"arm": "x"}]}))
    with pytest.raises(ValueError, match="a row has no"):
        load_rows([folder / "bad.json"])


@pytest.mark.parametrize("arm", ["peft", "ours-nf4"])
@pytest.mark.parametrize("shape_name", SHAPES)
def test_errors_of_two_percent_are_found(in_process, arm, shape_name):
    from arms import ARMS as BUILDERS
    from reference import relative_errors
    from results import ERROR_LIMIT, Check, check_table
    from shapes import SHAPES as BY_NAME
    from shapes import random_inputs

    device = torch.device("cpu")
    layer = BUILDERS[arm](BY_NAME[shape_name], device, 0)
    module = layer.module
    layer.module = lambda hidden_states, index, weights: module(1.02 * hidden_states, index, weights)
    errors = relative_errors(layer, random_inputs(layer.shape, 12, 1.0, device, 1))
    assert min(errors.values()) > ERROR_LIMIT
    assert check_table([Check(shape_name, arm, 12, errors)]).count("!") == len(errors)


def test_nan_is_marked(in_process):
    from results import Check, check_table

    assert check_table([Check("tiny", "ours-nf4", 1, {"output": math.nan})]).endswith("!")


def test_reference_does_not_depend_on_chunks(in_process, monkeypatch):
    import reference
    from arms import ARMS as BUILDERS
    from shapes import SHAPES as BY_NAME
    from shapes import random_inputs

    device = torch.device("cpu")
    layer = BUILDERS["ours-nf4"](BY_NAME["tiny-gpt-oss"], device, 0)
    inputs = random_inputs(layer.shape, 40, 1.0, device, 1)
    whole = reference.reference(layer, inputs)
    monkeypatch.setattr(reference, "CHUNK_ROWS", 3)
    for name, value in reference.reference(layer, inputs).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)
