"""The notebook runs from end to end, cell by cell, in a separate process, and is stored without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"

# runs the cells as a kernel does, without one: installing the Jupyter packages takes longer than this
RUN = """
import json, sys
from time import perf_counter
sys.path.insert(0, "")
space = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
import matplotlib.pyplot as plt
print("figures:", len(plt.get_fignums()))
print("improved:", space["loss_before"] - space["loss_after"] > 0.1)
print("ordered:", space["divergence"]["bf16"] < space["divergence"]["nf4, second-order"])
"""


def test_notebook_runs(tmp_path):
    environment = {**os.environ, "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(NOTEBOOK)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=NOTEBOOK.parent, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-3:] == ["figures: 2", "improved: True", "ordered: True"]


def test_notebook_is_stored_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
