"""What a user sees before and during the work: no notices of other libraries, progress, and the package's name."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from peft_moe_qlora import MoeQuantizationConfig, progress, quiet_import, save_bitsandbytes
from peft_moe_qlora.cli import main

_HEAVY = ("triton", "trl", "datasets", "vllm", "liger_kernel", "matplotlib", "torch._inductor", "torch._dynamo")
_IMPORT = f"""
import json, sys
import torch, transformers, peft
before = set(sys.modules)
import peft_moe_qlora, peft_moe_qlora.cli
print(json.dumps(sorted(name for name in set(sys.modules) - before if name.startswith({_HEAVY!r}))))
"""
_STOCK = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print(error, file=sys.stderr)
assert "peft_moe_qlora" not in sys.modules
"""


def _run(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_import_brings_no_heavy_modules():
    """Beyond those of torch, transformers and PEFT: what takes its time is imported where it is used."""
    assert json.loads(_run("-c", _IMPORT).stdout) == []


def test_start_of_the_command_line_is_quiet():
    """stderr is empty; which notices there could be depends on the CPU."""
    done = _run("-m", "peft_moe_qlora", "--help")
    assert done.stderr == ""
    assert "inspect" in done.stdout


def test_only_the_notice_is_dropped_and_only_at_import():
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert quiet_import.is_of_interest not in logger.filters
    notice, other = (
        logging.LogRecord(logger.name, logging.WARNING, "", 0, text, ("No module named 'kernels'",), None)
        for text in ("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "Failed: %s")
    )
    assert not quiet_import.is_of_interest(notice)
    assert quiet_import.is_of_interest(other)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A quantized model and where it is saved."""
    place = tmp_path_factory.mktemp("signs")
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(place / "base")
    model = AutoModelForCausalLM.from_pretrained(
        place / "base", dtype=torch.bfloat16, quantization_config=MoeQuantizationConfig()
    )
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    model.save_pretrained(place / "quantized")
    return model, place


def test_stock_transformers_names_the_package(quantized):
    """By `quant_method`, which is the name to install and to import."""
    _, place = quantized
    seen = _run("-c", _STOCK, str(place / "quantized")).stderr
    method = re.search(r"Unknown quantization type, got (\w+)", seen)[1]
    project = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    assert method.replace("_", "-") == re.search(r'^name = "(.+)"$', project, re.M)[1]


def test_long_work_shows_progress(quantized, tmp_path, capsys, monkeypatch):
    """Bars of what is mostly done in a moment appear once it has taken a while."""
    model, _ = quantized
    shown = []
    for name in ("loading.save_bnb", "experts.convert", "loading.checkpoint"):
        monkeypatch.setattr(f"peft_moe_qlora.{name}.PATIENCE", 0)
    save_bitsandbytes(model, tmp_path / "packed")
    shown.append("Packing experts")
    AutoModelForCausalLM.from_pretrained(quantized[1] / "quantized").dequantize()
    shown += ["Reading headers", "Dequantizing experts"]
    seen = capsys.readouterr().err
    assert [name for name in shown if name not in seen] == []
    assert progress.PATIENCE <= 10


def test_inspect_of_a_name_says_how(capsys):
    """A name instead of a directory, which `--card` takes."""
    assert main(["inspect", "Qwen3-30B-A3B"]) == 1
    assert "--card" in capsys.readouterr().err


def test_what_libraries_print_is_not_in_the_result(capsys, monkeypatch):
    """DeepSpeed logs to stdout when it is imported; a program that reads the JSON must not meet that."""
    import peft_moe_qlora.cli as cli

    def noisy(*args):
        print("[INFO] Setting ds_accelerator to cpu")
        return read_sizes(*args)

    read_sizes = cli.read_sizes
    monkeypatch.setattr(cli, "read_sizes", noisy)
    assert main(["inspect", "Qwen3-30B-A3B", "--card", "24", "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)
    assert "ds_accelerator" in found.err
