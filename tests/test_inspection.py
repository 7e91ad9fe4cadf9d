"""`peft-moe-qlora inspect`: its figures match those of loading, and it reads no weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from checkpoint_writers import pack, read_tensors, write_tensors
from peft import get_peft_model
from shrunken_models import shrunken_model_or_skip
from tiny_models import tiny_model

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, experts_report, load_quantized
from peft_moe_qlora.cli import main
from peft_moe_qlora.loading import Checkpoint
from peft_moe_qlora.ops import kept_nbytes


def inspected(capsys: pytest.CaptureFixture, *arguments) -> dict:
    capsys.readouterr()  # removes output that libraries such as DeepSpeed print at import
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_sizes_match_the_loaded_model(model_type, double_quant, tmp_path, capsys):
    tiny_model(model_type, dtype=torch.bfloat16).save_pretrained(tmp_path)
    options = ["--r", 8, "--expert-r", 2, *(["--double-quant"] if double_quant else [])]
    found = inspected(capsys, tmp_path, *options)
    model = load_quantized(
        tmp_path, MoeQuantizationConfig(double_quant=double_quant, quantize_linear=False), device_map="cpu"
    )
    report = experts_report(model)
    assert sum(group["packed_nbytes"] for group in found["stacks"]) == report.nbytes
    assert sum(group["dense_nbytes"] for group in found["stacks"]) == report.dense_nbytes
    assert sum(group["count"] for group in found["stacks"]) == len(report.stacks)
    config = MoeQLoraConfig(r=8, expert_r=2, double_quant=double_quant, target_modules="all-linear")
    model = get_peft_model(model, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    on_experts = sum(group["adapter_parameters"] for group in found["stacks"])
    assert on_experts == model.experts_report().num_adapter_parameters
    assert on_experts + found["linear_adapter_parameters"] == trained
    memory = found["memory"]
    assert (memory["factors"], memory["gradients"], memory["optimizer"]) == (4 * trained, 4 * trained, 8 * trained)


@pytest.mark.parametrize("model_type", ["jamba", "axk2", "deepseek_v4"])
def test_layers_unsupported_by_lora_are_not_counted(model_type, tmp_path, capsys):
    model = shrunken_model_or_skip(model_type)
    model.save_pretrained(tmp_path)
    found = inspected(capsys, tmp_path, "--r", 8)
    model = get_peft_model(
        model, MoeQLoraConfig(r=8, target_modules="all-linear", exclude_modules=["experts.gate_up_proj"])
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found["linear_adapter_parameters"] == trained - model.experts_report().num_adapter_parameters


def test_keep_experts_is_counted(tmp_path, capsys):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    plain = inspected(capsys, tmp_path, "--r", 4)["memory"]
    assert plain["kept_experts"] == 0
    found = inspected(capsys, tmp_path, "--r", 4, "--keep-experts")
    # 2 layers, 2048 tokens, hidden 64, two experts of 32 for each
    kept = 2 * kept_nbytes(2048, 2, 64, 2 * 32, 4)
    assert found["memory"] == plain | {"kept_experts": kept, "fragmentation": found["memory"]["fragmentation"]}
    assert main(["inspect", str(tmp_path), "--keep-experts"]) == 0
    assert "gradient checkpointing of all but the experts:" in capsys.readouterr().out


def test_no_weights_are_read(tmp_path, capsys, monkeypatch):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.delattr(Checkpoint, "read")
    monkeypatch.delattr(Checkpoint, "read_slice")
    assert inspected(capsys, tmp_path)["model_class"] == "Qwen3MoeForCausalLM"


@pytest.mark.parametrize("model_type", ["gemma4", "ernie4_5_vl_moe", "nemotron_h", "llama4", "inkling2_loop_text"])
def test_other_architectures(model_type, tmp_path, capsys):
    shrunken_model_or_skip(model_type).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "for training with 1 x 2048 tokens" in capsys.readouterr().out


def test_checkpoints_packed_by_other_tools(tmp_path, capsys):
    tiny_model(dtype=torch.bfloat16, moe_intermediate_size=64).save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path)
    write_tensors(tmp_path, pack(tensors, lambda key: ".experts." in key and ".0.mlp" in key, quant_type="fp4"))
    stacks = inspected(capsys, tmp_path)["stacks"]
    found = {group["found"] for group in stacks}
    assert found == {"bitsandbytes fp4/64", "bfloat16, one tensor per expert"}


def test_4_bit_checkpoints_keep_their_storage(tmp_path, capsys):
    """Regardless of the command's storage options; linear layers in 16 bits are counted as such."""
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = MoeQuantizationConfig("fp4", 32, quantize_linear=False, skip_modules=["layers.1.mlp.experts"])
    model = load_quantized(tmp_path / "dense", config, device_map="cpu")
    model.save_pretrained(tmp_path / "packed")
    found = inspected(capsys, tmp_path / "packed", "--blocksize", 256)
    assert {group["found"] for group in found["stacks"]} == {"fp4/32", "bfloat16, fused"}
    assert sum(group["packed_nbytes"] for group in found["stacks"]) == experts_report(model).nbytes
    weights = sum(found["memory"][name] for name in ("experts", "linear_layers", "other_weights"))
    assert weights == sum(parameter.nbytes for parameter in model.parameters())


def test_missing_directory(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not a directory" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path, capsys):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    assert main(["inspect", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch("peft-moe-qlora inspect: .*model.safetensors cannot be opened.*", printed.err.splitlines()[-1])


@pytest.mark.parametrize("option", ["--r=0", "--seq=-3", "--blocksize=48", "--quant-type=int4"])
def test_invalid_options(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path), option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_storage_format_by_name(tmp_path, capsys):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    found = inspected(capsys, tmp_path, "--storage", "fp8/16x32")
    config = MoeQuantizationConfig(storage="fp8/16x32", quantize_linear=False)
    model = load_quantized(tmp_path, config, device_map="cpu")
    assert sum(group["packed_nbytes"] for group in found["stacks"]) == experts_report(model).nbytes
    assert main(["inspect", str(tmp_path), "--storage", "fp9"]) == 1
    assert "'fp9' is not a storage format" in capsys.readouterr().err
