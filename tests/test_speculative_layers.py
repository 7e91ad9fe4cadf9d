"""Layers for speculative decoding after the last layer of a checkpoint, which the class does not have."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_writers import read_tensors, write_tensors
from tiny_models import logits, tiny_model, token_ids

from peft_moe_qlora import CheckpointError, MoeQuantizationConfig, load_quantized


def save(directory, declared: int) -> torch.nn.Module:
    """Two layers and one more after them; the class lists number 61 as such, as for DeepSeek-V3."""
    model = tiny_model("deepseek_v3")
    model.save_pretrained(directory)
    tensors = read_tensors(directory)
    write_tensors(
        directory, tensors | {key.replace(".1.", ".2.", 1): one for key, one in tensors.items() if "s.1." in key}
    )
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["num_nextn_predict_layers"] = declared
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def test_they_are_skipped_for_any_number_of_layers(tmp_path):
    model = save(tmp_path, 1)
    config = MoeQuantizationConfig(quant_type="nf4", quantize_linear=False)
    loaded = load_quantized(tmp_path, config, dtype=torch.float32, device_map="cpu")
    model.save_pretrained(tmp_path / "without")
    expected = load_quantized(tmp_path / "without", config, dtype=torch.float32, device_map="cpu")
    assert torch.equal(logits(loaded, token_ids()), logits(expected, token_ids()))


def test_undeclared_layers_are_rejected(tmp_path):
    save(tmp_path, 0)
    with pytest.raises(CheckpointError, match=r"layers\.2\..* that the model does not have"):
        load_quantized(tmp_path, dtype=torch.float32, device_map="cpu")
