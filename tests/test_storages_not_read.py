"""Checkpoints in unsupported quantization formats: the config is checked first, with one error for all operations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_writers import read_tensors, set_bitsandbytes_config, write_tensors
from merged_checkpoints import save_adapter

from peft_moe_qlora import CheckpointError, load_experts, load_quantized
from peft_moe_qlora.cli import main
from peft_moe_qlora.loading.quantization_config import quant_method

AWQ = {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}
INT3 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}}},
}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
OLD_INT8 = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """`base`, to be quantized, and `adapter`."""
    directory = tmp_path_factory.mktemp("saved")
    save_adapter(directory, "gpt_oss", dtype=torch.bfloat16, target_modules=["experts"])
    return directory


def quantize(directory: Path, config: dict) -> None:
    """Replaces the keys of experts by a method's, and writes its config into config.json."""
    tensors = read_tensors(directory)
    before = {key: tensors.pop(key) for key in list(tensors) if ".experts." in key and not key.endswith("_bias")}
    for key, tensor in before.items():
        num_experts, rows, columns = tensor.shape
        if config is AWQ:
            tensors[key] = torch.zeros(num_experts, columns, rows // 2, dtype=torch.uint8)
            tensors[f"{key}_scale"] = torch.zeros(num_experts, columns, rows // 16).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_2"] = torch.ones(num_experts)
        else:
            tensors[key] = torch.zeros(
                tensor.shape, dtype=torch.int8 if "load_in_8bit" in config else torch.float8_e4m3fn
            )
            tensors[f"{key}_scale_inv"] = torch.ones(num_experts, 1, 1)
    write_tensors(directory, tensors)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (AWQ, "'modelopt'"),
        (INT3, "'compressed-tensors'"),
        (INT8, "'bitsandbytes' in 8 bits"),
        (OLD_INT8, "'bitsandbytes' in 8 bits"),
        ({"bits": 4}, "'a method without a name'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_error_names_the_method_and_the_remedy(config, name, saved, tmp_path, capsys):
    """Everything that opens the checkpoint raises the same message."""
    base, adapter, merged = (str(tmp_path / one) for one in ("base", "adapter", "merged"))
    for one in ("base", "adapter"):
        shutil.copytree(saved / one, tmp_path / one)
    quantize(tmp_path / "base", config)
    expected = (
        f"{base} is quantized by {name}, which is not supported for experts. Use the 16-bit checkpoint of the model, "
        "or one in a format listed in docs/formats.md."
    )
    for command in (
        ["inspect", base],
        ["merge", base, adapter, merged],
        ["merge", base, adapter, merged, "--dry-run"],
        ["merge", base, adapter, merged, "--quantize", "nf4"],
    ):
        assert main(command) == 1
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1] == f"peft-moe-qlora {command[0]}: {expected}"
        assert printed.out == ""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(saved / "base"))
    for load in (lambda: load_quantized(base, device_map="cpu"), lambda: load_experts(model, base)):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert str(caught.value) == expected


def test_4_bit_base_requires_quantize(saved, tmp_path, capsys):
    """It can be read, but not merged in its layout."""
    shutil.copytree(saved / "base", tmp_path / "base")
    set_bitsandbytes_config(tmp_path / "base", ["lm_head"])
    assert main(["merge", str(tmp_path / "base"), str(saved / "adapter"), str(tmp_path / "merged")]) == 1
    assert "is quantized by 'bitsandbytes'" in (printed := capsys.readouterr().err)
    assert "--quantize" in printed


@pytest.mark.parametrize("value", [True, "fp8", ["fp8"], 3])
def test_invalid_quantization_configs(value, saved, tmp_path, capsys):
    shutil.copytree(saved / "base", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": value}))
    base = str(tmp_path / "base")
    for command in (["inspect", base], ["merge", base, str(saved / "adapter"), str(tmp_path / "merged")]):
        assert main(command) == 1
        assert f"config.json: quantization_config={value!r}. Expected an object" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="Expected an object"):
        load_quantized(base)


def test_method_as_an_enum():
    """As in `BitsAndBytesConfig.to_dict`."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    assert quant_method(config) == "bitsandbytes"
    assert (
        quant_method({**config, "quant_method": transformers.utils.quantization_config.QuantizationMethod.FP8})
        == "fp8"
    )
