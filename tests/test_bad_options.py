"""Adapter configs with invalid option values, and tensors of unsupported dtypes."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from adapters_of_others import random_factors, write_mlx, write_per_expert
from saved_adapters import saved_deltas
from test_import_adapters import edit_tensors, save_base, tensors_of

from peft_moe_qlora.base_identity import BaseIdentity
from peft_moe_qlora.layouts import convert_adapter, read_adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name of a layout -> an adapter in it, each valid; do not modify."""
    root = tmp_path_factory.mktemp("saved")
    saved_deltas(root)
    (root / "adapter").rename(root / "ours")
    convert_adapter(root / "ours", root / "peft-lora", "peft-lora")
    save_base(root / "of others", "qwen3_moe")
    write_per_expert(root / "per-expert", root / "of others", *random_factors())
    write_mlx(root / "mlx", root / "of others", *random_factors())
    for name in ("ours", "peft-lora", "per-expert", "mlx"):
        read_adapter(root / name)
    return root


@pytest.fixture
def copied(saved, tmp_path):
    return lambda name: shutil.copytree(saved / name, tmp_path / name)


def set_option(directory, option: str, value) -> None:
    """Sets an option by its path, `a.b` for b of a, to a value, or removes it (`...`)."""
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    *parents, last = option.split(".")
    options = config
    for parent in parents:
        options = options[parent]
    options.pop(last, None)
    if value is not ...:
        options[last] = value
    file.write_text(json.dumps(config))


COMMON = [
    ("target_modules", 5),
    ("target_modules", "(q_proj"),
    ("target_modules", [5]),
    ("exclude_modules", "(q_proj"),
    ("exclude_modules", 5),
    ("rank_pattern", [5]),
    ("rank_pattern", {"q_proj": "4"}),
    ("rank_pattern", {"q_proj": 2.5}),
    ("rank_pattern", {"(q_proj": 4}),
    ("alpha_pattern", "x"),
    ("alpha_pattern", {"q_proj": True}),
    ("alpha_pattern", {"(": 2.0}),
    ("r", True),
    ("r", 0),
    ("r", 2.5),
    ("r", None),
    ("r", ...),
    ("lora_alpha", [6]),
    ("lora_alpha", float("nan")),
    ("lora_alpha", 10**400),
    ("lora_alpha", ...),
    ("lora_dropout", "x"),
    ("lora_dropout", 1.5),
    ("layers_to_transform", "x"),
    ("layers_to_transform", [0, -1]),
    ("layers_pattern", "(layers"),
    ("modules_to_save", 5),
    ("modules_to_save", "norm"),
    ("modules_to_save", ["(norm"]),
    ("trainable_token_indices", "x"),
    ("trainable_token_indices", {"embed_tokens": 5}),
    ("auto_mapping", 3),
    ("bias", 5),
    ("task_type", []),
    ("use_rslora", "false"),
    ("use_rslora", 1),
    ("base_model_name_or_path", 5),
    ("peft_version", 0.19),
]
OF_OTHERS = [
    ("target_parameters", [5]),
    ("lora_B_layout", ["rank_major"]),
    ("unsloth_fused_expert_lora", [5]),
    ("unsloth_fused_expert_lora", {"parameters": {"down_proj": 5}}),
    ("auto_mapping", {"unsloth_fused_expert_lora": {"lora_B_layout": 5}}),
]
OWN = [
    ("target_modules", None),
    ("target_modules", ...),
    ("lora_dropout", None),
    ("rank_pattern", None),
    ("alpha_pattern", ...),
    ("use_rslora", ...),
    ("expert_r", 0),
    ("expert_alpha", "x"),
    ("quant_type", "int8"),
    ("quant_type", ...),
    ("blocksize", 63),
    ("double_quant", 1),
    ("format_version", "1"),
    ("base", []),
    ("base", {"model": "qwen3_moe"}),
    ("base.model_type", 5),
    ("base.dtype", "linear"),
    ("base.dense_stacks", "x"),
    ("base.linear", [5]),
    ("base.linear", {"nf5": []}),
    ("base.linear", {"nf4/64": "q_proj"}),
    ("base.samples", {"model.layers.0.mlp.experts.down_proj": [None]}),
    ("base.samples", 5),
]
OF_MLX = [
    ("fine_tune_type", 5),
    ("model", ["x"]),
    ("num_layers", "x"),
    ("num_layers", None),
    ("num_layers", ...),
    ("num_layers", True),
    ("lora_parameters", []),
    ("lora_parameters", ...),
    ("lora_parameters.rank", ...),
    ("lora_parameters.rank", 0),
    ("lora_parameters.rank", 2.5),
    ("lora_parameters.scale", "x"),
    ("lora_parameters.dropout", "x"),
    ("lora_parameters.keys", 5),
]
CASES = [
    *(("ours", *case) for case in COMMON + OWN),
    *(("peft-lora", *case) for case in COMMON + OF_OTHERS),
    ("per-expert", "target_modules", None),
    ("per-expert", "target_modules", []),
    *(("mlx", *case) for case in OF_MLX),
]


@pytest.mark.parametrize(("layout", "option", "value"), CASES, ids=str)
def test_invalid_option_is_named(copied, layout, option, value):
    """No option causes a traceback or is taken for another value: the error names file and option."""
    directory = copied(layout)
    set_option(directory, option, value)
    with pytest.raises(ValueError, match="Expected") as caught:
        read_adapter(directory)
    assert str(directory / "adapter_config.json") in str(caught.value)
    assert re.search(rf"\b{option.rpartition('.')[2]}\b", str(caught.value)) is not None


@pytest.mark.parametrize("layout", ["peft-lora", "per-expert"])
def test_null_options_of_other_tools_use_the_default(copied, layout):
    """Other tools write null for options with a default; this is no reason to reject the file."""
    directory = copied(layout)
    expected = read_adapter(directory).config
    for option in ("rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "layers_to_transform"):
        set_option(directory, option, None)
    assert read_adapter(directory).config == expected


def test_unsupported_options_name_the_file(copied):
    """`check_honoured` does not know the file; the reader adds its name."""
    for layout in ("ours", "peft-lora"):
        directory = copied(layout)
        set_option(directory, "use_dora", True)
        with pytest.raises(ValueError, match=rf"{directory}.*use_dora=True is not supported"):
            read_adapter(directory)


def test_base_record_is_validated_everywhere():
    """Loading and merging read the record from the config too, without `read_adapter`."""
    good = {"model_type": "x", "dtype": "bfloat16", "linear": {"nf4/64+dq": ["q_proj"]}, "samples": {"x": [1, 0.5]}}
    assert BaseIdentity.of(good).linear_storage("q_proj").double_quant
    assert BaseIdentity.of({**good, "dtype": "", "linear": {}}) is not None
    with pytest.raises(ValueError, match=r"has dtype=''\. Expected the name of a torch dtype"):
        BaseIdentity.of({**good, "dtype": ""})
    with pytest.raises(ValueError, match=r"has samples=\{'x': \['1'\]\}\. Expected .* names to lists of numbers"):
        BaseIdentity.of({**good, "samples": {"x": ["1"]}})


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
@pytest.mark.parametrize("layout", ["ours", "peft-lora", "per-expert", "mlx"])
def test_factors_of_unsupported_dtype(copied, layout, dtype):
    """Quantized factors have no scales here; read as plain numbers they would be another adapter."""
    directory = copied(layout)
    name = "adapters.safetensors" if layout == "mlx" else "adapter_model.safetensors"
    key = next(key for key in tensors_of(directory, name) if "experts" in key or "switch_mlp" in key)
    edit_tensors(directory, {key: tensors_of(directory, name)[key].to(dtype)}, name)
    with pytest.raises(ValueError, match=rf"{name}: {re.escape(key)} is stored as {str(dtype)[6:]}\. Expected float"):
        read_adapter(directory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_floating_dtypes_are_read(copied, dtype):
    """Only dtypes that are not floating-point, or have 8 bits, are rejected."""
    directory = copied("ours")
    edit_tensors(directory, {key: tensor.to(dtype) for key, tensor in tensors_of(directory).items()})
    assert {one.A.dtype for one in read_adapter(directory).experts} == {dtype}
