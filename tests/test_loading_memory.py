"""Peak memory of loading is little more than the loaded model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "loading.py"
# a 16-bit expert, and fp32 copies of it while it is quantized; the rest is the library's overhead
SLACK = 80 * 2**20


@pytest.mark.parametrize("shape", ["small", "small-fused"])
def test_peak_memory_of_loading(shape, tmp_path, device):
    """400 MB of experts in 16 bits, 113 MB in 4. Loading through 16 bits would need the memory of all layers."""
    found = tmp_path / "found.json"
    options = ["--shape", shape, "--directory", tmp_path / "checkpoint", "--device", device, "--json", found]
    subprocess.run([sys.executable, SCRIPT, *map(str, options)], check=True, capture_output=True)
    results = json.loads(found.read_text())
    row = results["rows"][0]
    assert results["checkpoint_bytes"] > 3 * (row["weights"] + SLACK) / 2
    assert row["weights"] < 0.3 * results["checkpoint_bytes"]
    if device == "cuda":
        assert row["gpu_peak"] < row["weights"] + SLACK
    else:
        assert row["cpu_peak"] < row["weights"] + SLACK
