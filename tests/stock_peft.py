"""Models and adapters in transformers and PEFT without this package.

Also in those versions of PEFT between which its layout of experts' factors changed, installed side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from functools import cache
from pathlib import Path

import peft
import pytest
import torch

INSTALLED = peft.__version__
VERSIONS = ("0.18.1", "0.19.0", "0.19.1", INSTALLED)

_SCRIPT = """
    import json, sys, traceback
    sys.modules["peft_moe_qlora"] = None  # can't be imported
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch, transformers
    from peft import LoraConfig, PeftModel, __version__, get_peft_model

    def run(job):
        model = transformers.AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
        if "options" in job:
            model = get_peft_model(model, LoraConfig(**job["options"]))
            generator = torch.Generator().manual_seed(5)
            for name, parameter in sorted(model.named_parameters()):
                if ".lora_" in name:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            model.save_pretrained(job["adapter"])
        elif "adapter" in job:
            model = PeftModel.from_pretrained(model, job["adapter"])
        if "resaved" in job:
            model.save_pretrained(job["resaved"])
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor(job["ids"])).logits
        torch.save((__version__, logits), job["logits"])

    for line in sys.stdin:
        try:
            run(json.loads(line))
            answer = None
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)
"""


def run_stock_peft(jobs: list[dict], version: str = INSTALLED) -> None:
    """Loads models in a process that has that version of PEFT and not this package.

    Args:
        jobs: each with a directory `base`, `ids` and `logits`, a file for the version and the logits; and maybe with
            `dtype`, float32 by default. Jobs with `options` create an adapter of a `LoraConfig` with random factors
            and save it to the directory `adapter`. Others load it, if given. `resaved` is a directory to save it to.
        version: of PEFT.
    """
    if version == INSTALLED:
        _run(jobs, _process_of_installed())
    else:
        with _start(version) as process:
            _run(jobs, process)


def stock_logits(
    base: Path, ids: torch.Tensor, adapter: Path | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits of a model, with an adapter if given, in a process that does not have this package."""
    file = base.with_name(f"{base.name}-logits.pt")
    job = {
        "base": str(base),
        "dtype": str(dtype).removeprefix("torch."),
        "ids": ids.tolist(),
        "logits": str(file),
    }
    run_stock_peft([job if adapter is None else {**job, "adapter": str(adapter)}])
    return torch.load(file)[1]


def _run(jobs: list[dict], process: subprocess.Popen) -> None:
    for job in jobs:
        print(json.dumps({"dtype": "float32", **job}), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"the process ended with exit code {process.wait()}"
        error = json.loads(answer)
        assert error is None, error


@cache
def _process_of_installed() -> subprocess.Popen:
    """One process for all tests, since importing takes seconds; it ends when its input is closed."""
    return _start(INSTALLED)


def _start(version: str) -> subprocess.Popen:
    environment = dict(os.environ)
    if version != INSTALLED:
        path = [str(_installed(version)), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-c", textwrap.dedent(_SCRIPT)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _installed(version: str) -> Path:
    """Installs a version of PEFT into a separate directory, once."""
    place = Path(tempfile.gettempdir()) / f"peft-{version}-for-tests"
    if place.is_dir():
        return place
    with tempfile.TemporaryDirectory() as fresh:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", fresh, f"peft=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "No matching distribution" in done.stderr:
            pytest.skip(f"peft=={version} is not available: the package index cannot be reached")
        assert done.returncode == 0, done.stderr[-3000:]
        if not place.is_dir():
            Path(fresh).rename(place)
            Path(fresh).mkdir()
    return place
