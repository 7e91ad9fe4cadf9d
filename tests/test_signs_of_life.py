"""Messages before and during the work: no notices of other libraries, progress bars, and the package's name."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model
from tiny_models import randomize_adapter, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, progress, quiet_import, save_bitsandbytes
from peft_moe_qlora.cli import main
from peft_moe_qlora.layouts import convert_adapter
from peft_moe_qlora.merge import merge_quantized

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
    """Beyond those of torch, transformers and PEFT: slow modules are imported where they are used."""
    assert json.loads(_run("-c", _IMPORT).stdout) == []


def test_start_of_the_command_line_is_quiet():
    """stderr is empty; the possible notices depend on the CPU."""
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
    """A quantized model, and the directory that contains it."""
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


def test_long_operations_show_progress(quantized, tmp_path, capsys, monkeypatch):
    """Bars of usually fast operations appear after a delay."""
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


def test_converting_shows_progress(tmp_path, capsys, monkeypatch):
    """Bars of the loops, and a line before a large file is written."""
    for name in ("adapter_file", "read", "uniform"):
        monkeypatch.setattr(f"peft_moe_qlora.layouts.{name}.PATIENCE", 0)
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    config = MoeQLoraConfig(r=2, base_model_name_or_path=str(tmp_path / "base"))
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    for target, file in (("vllm", "adapter_model.safetensors"), ("mlx", "adapters.safetensors")):
        monkeypatch.setattr(progress, "LARGE_FILE", 1)
        capsys.readouterr()
        arguments = ["convert", str(tmp_path / "adapter"), str(tmp_path / target), "--to", target]
        assert main([*arguments, "--base", str(tmp_path / "base")]) == 0
        seen = capsys.readouterr().err
        shown = ("Reading adapter", "Converting factors", f"Writing {tmp_path / target / file} (0.0 GiB)")
        assert [name for name in shown if name not in seen] == []
        monkeypatch.setattr(progress, "LARGE_FILE", 2**30)
        convert_adapter(tmp_path / "adapter", tmp_path / f"{target} again", target, tmp_path / "base")
        assert "Writing" not in capsys.readouterr().err


def test_merge_check_shows_progress(capsys, monkeypatch):
    """Three runs of the model, whose outputs the progress bar does not change."""
    monkeypatch.setattr("peft_moe_qlora.merge.check.PATIENCE", 0)
    checks = []
    for progressbar in (True, False):
        model = get_peft_model(tiny_model("qwen3_moe"), MoeQLoraConfig(r=2))
        randomize_adapter(model)
        capsys.readouterr()
        model.merge_and_unload(progressbar=progressbar, calibration=token_ids())
        checks.append(model.base_model.merge_check)
        seen = capsys.readouterr().err
        shown = [f"Running the {one} model: 100%" in seen for one in ("adapted", "merged")]
        assert [*shown, "Running the base: 100%" in seen] == [progressbar] * 3
    assert checks[0] == checks[1]
    assert checks[0].num_positions > 0


def test_checkpoint_names_the_package(quantized, tmp_path):
    """In its config, and for merged checkpoints in a README, unless the base has one."""
    _, place = quantized
    written = json.loads((place / "quantized" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert "pip install peft-moe-qlora" in written["loading"]
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.bfloat16)
    model = get_peft_model(base, MoeQLoraConfig(r=2, base_model_name_or_path=str(place / "base")))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_quantized(place / "base", tmp_path / "adapter", tmp_path / "merged", rounding="nearest", progressbar=False)
    assert written["loading"] in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "merged" / "README.md.writing").exists()


def test_inspect_of_a_model_name_suggests_card(capsys):
    """A name instead of a directory requires `--card`."""
    assert main(["inspect", "Qwen3-30B-A3B"]) == 1
    assert "--card" in capsys.readouterr().err


def test_output_of_libraries_is_not_in_the_result(capsys, monkeypatch):
    """DeepSpeed logs to stdout when it is imported, which must not get into the JSON."""
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
