"""Released versions of PEFT between which its layout of experts' factors changed, installed side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import peft
import pytest

INSTALLED = peft.__version__
VERSIONS = ("0.18.1", "0.19.0", "0.19.1", INSTALLED)

_SCRIPT = """
    import json, sys
    sys.modules["peft_moe_qlora"] = None  # can't be imported
    import torch, transformers
    from peft import LoraConfig, PeftModel, __version__, get_peft_model
    jobs = json.load(open(sys.argv[1]))
    for job in jobs:
        base = transformers.AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
        if "options" in job:
            model = get_peft_model(base, LoraConfig(**job["options"])).eval()
            generator = torch.Generator().manual_seed(5)
            for name, parameter in sorted(model.named_parameters()):
                if ".lora_" in name:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            model.save_pretrained(job["adapter"])
        else:
            model = PeftModel.from_pretrained(base, job["adapter"]).eval()
            if "resaved" in job:
                model.save_pretrained(job["resaved"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(job["ids"])).logits
        torch.save((__version__, logits), job["logits"])
"""


def run_stock_peft(jobs: list[dict], directory: Path, version: str = INSTALLED) -> None:
    """Creates or loads adapters in a process that has that version of PEFT and not this package.

    Args:
        jobs: each with `base` and `adapter`, directories, `ids`, and `logits`, a file to write. Jobs with `options`
            create an adapter of a `LoraConfig` with random factors and save it. The others load one, and save it
            again as `resaved` if that is given.
        directory: for the list of jobs.
        version: of PEFT.
    """
    file = directory / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = dict(os.environ)
    if version != INSTALLED:
        path = [str(_installed(version)), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-c", textwrap.dedent(_SCRIPT), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


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
