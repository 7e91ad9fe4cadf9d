"""Converted adapters that skip layers: the converted config excludes them, and the deltas are the same."""

from __future__ import annotations

import pytest
import torch
from checkpoint_writers import read_tensors
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from saved_adapters import saved_deltas

from peft_moe_qlora.layouts import convert_adapter
from peft_moe_qlora.merge import merge_checkpoint

OPTIONS = {
    "a linear layer": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "by a pattern": {"exclude_modules": r".*layers\.1\.self_attn\.(q|k|v)_proj"},
    "experts": {"exclude_modules": ["layers.0.mlp.experts"]},
    "one projection of experts": {"exclude_modules": ["layers.1.mlp.experts.down_proj"]},
    "all but one": {"target_modules": ["layers.0.self_attn.o_proj", "experts"]},
    "a layer, and of another a part": {
        "target_modules": ["o_proj", "experts"],
        "layers_to_transform": [0, 1],
        "exclude_modules": ["layers.1.mlp.experts"],
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("model_type", "target"),
    [
        ("qwen3_moe", "per-expert"),
        ("qwen3_moe", "mlx"),
        ("qwen3_moe", "vllm"),
        ("mixtral", "per-expert"),  # has other layer names in its checkpoint
        ("gpt_oss", "sglang"),  # has one tensor for all experts
        ("gpt_oss", "peft-lora"),
    ],
)
def test_converted_adapter_has_the_same_deltas(model_type, target, options, tmp_path):
    """Our own reader rejected it as damaged."""
    saved_deltas(
        tmp_path, model_type, **{"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "experts"], **options}
    )
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    convert_adapter(adapter, tmp_path / "converted", target, base)
    merged = []
    for one in (adapter, tmp_path / "converted"):
        merge_checkpoint(base, one, tmp_path / f"{one.name}-merged", onto="base", progressbar=False)
        merged.append(read_tensors(tmp_path / f"{one.name}-merged"))
    expected, found = merged
    before = read_tensors(base)
    assert found.keys() == expected.keys()
    is_changed = {not torch.equal(expected[key], before[key]) for key in expected if "attn" in key or "experts" in key}
    assert is_changed == {True, False}
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_skipped_modules_match_stock_peft(model_type, tmp_path):
    """By the names of the model and of its checkpoint, including those of experts as linear layers."""
    saved_deltas(tmp_path, model_type, exclude_modules=["layers.0.mlp.experts", "layers.1.self_attn.k_proj"])
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "per-expert", tmp_path / "base")
    config = LoraConfig.from_pretrained(tmp_path / "converted")
    block, parts = {
        "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        "mixtral": ("block_sparse_moe.experts", ("w1", "w2", "w3")),
    }[model_type]

    def is_reached(name: str) -> bool:
        return check_target_module_exists(config, f"model.layers.{name}") is True

    for expert in (0, 3):
        assert not any(is_reached(f"0.{block}.{expert}.{part}") for part in parts)
        assert all(is_reached(f"1.{block}.{expert}.{part}") for part in parts)
    assert not is_reached("1.self_attn.k_proj")
    assert is_reached("0.self_attn.k_proj")
    assert is_reached("1.self_attn.q_proj")


def test_no_exclusions_if_no_layer_is_skipped(tmp_path):
    saved_deltas(tmp_path, "deepseek_v3")
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "per-expert", tmp_path / "base")
    assert LoraConfig.from_pretrained(tmp_path / "converted").exclude_modules is None
