"""Every kernel compiles for a GPU, for all mixes of dtypes; Triton's interpreter does not check types."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import peft_moe_qlora

SOURCES = Path(peft_moe_qlora.__file__).parent.rglob("*.py")
KERNEL = re.compile(r"^@(?:triton|gluon)\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)
KERNELS = sorted(name for path in SOURCES for name in KERNEL.findall(path.read_text(encoding="utf-8")))
NOT_IN_FP32 = {"_plain_scales_kernel", "specialized_gemm_kernel", "_gate_factors_kernel", "_sum_of_parts_kernel"}
"""Products that decode their weight inside, and what is launched before them, have no tiles for fp32; the gate's
backward in one pass is for 16 bits, with the sum of its parts."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_kernel_compiles(dtype: str) -> None:
    """With activations in a dtype; `run_everything` in compile_kernels.py must launch each kernel."""
    # a separate process, since kernels run in the interpreter in this one
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-8000:]
    results = json.loads(done.stdout.splitlines()[-1])
    if results["failures"]:
        pytest.fail("\n\n".join(results["failures"]), pytrace=False)
    assert set(results["kernels"]) == set(KERNELS) - (NOT_IN_FP32 if dtype == "float32" else set())
