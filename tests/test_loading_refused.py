"""Loading calls that are rejected before any change, and directories with leftovers of earlier saves."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny_models import assert_same_bytes, packed_bytes, tiny_model

from peft_moe_qlora import (
    CheckpointError,
    MoeQuantizationConfig,
    QuantizedExperts,
    load_experts,
    load_quantized,
)
from peft_moe_qlora.loading import Checkpoint


def in_4_bits(path, config: MoeQuantizationConfig | None = None, **kwargs):
    config = config or MoeQuantizationConfig(quantize_linear=False)
    return load_quantized(path, config, **{"dtype": torch.bfloat16, "device_map": "cpu", **kwargs})


@pytest.mark.parametrize(
    "other", [transformers.BitsAndBytesConfig(load_in_4bit=True), {"load_in_4bit": True}], ids=type
)
def test_configs_of_other_methods_are_rejected(other, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected a MoeQuantizationConfig"):
        load_quantized(tmp_path, other)


@pytest.mark.parametrize("skipped", ["*.mlp", "("])
def test_skip_modules_that_are_not_a_regular_expression(skipped, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"skip_modules contains .* not a regular expression"):
        in_4_bits(tmp_path, MoeQuantizationConfig(skip_modules=[skipped]))


def on_meta(path) -> torch.nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_modules": ["nothing"]}, "skip_modules contains 'nothing'"),
        ({"dtype": torch.float64}, "loading experts as torch.float64"),
        ({"dtype": "bfloat16"}, "loading experts as bfloat16"),
    ],
    ids=str,
)
def test_invalid_options_of_load_experts(options, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = on_meta(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_experts(model, tmp_path, progressbar=False, **options)
    assert not any(isinstance(module, QuantizedExperts) for module in model.modules())


def test_unsupported_dtype_of_experts(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"as torch.float64 is not supported\. Pass dtype=torch.bfloat16"):
        in_4_bits(tmp_path, dtype=torch.float64)


def test_codes_without_a_recorded_storage(tmp_path):
    """For example, FP4 would be read as NF4."""
    tiny_model().save_pretrained(tmp_path / "dense")
    in_4_bits(tmp_path / "dense", MoeQuantizationConfig("fp4", quantize_linear=False)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    for load in (load_quantized, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"no config.json with its storage"):
            load(tmp_path, quantization_config=MoeQuantizationConfig(), device_map="cpu")


@pytest.mark.parametrize("method", [{"quant_method": "peft_moe_qlora"}, {"load_in_4bit": True}], ids=str)
def test_quantization_config_of_an_unquantized_checkpoint(method, tmp_path):
    model = tiny_model()
    model.config.quantization_config = method
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"declares that the model is quantized by .*, but none of the"):
        load_quantized(tmp_path, device_map="cpu")


def test_saving_over_a_sharded_checkpoint(tmp_path):
    """transformers removes the shards and leaves their index."""
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    model = in_4_bits(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_bytes(packed_bytes(load_quantized(tmp_path, device_map="cpu")), packed_bytes(model))


def test_shards_next_to_a_single_file_checkpoint(tmp_path):
    """transformers leaves the single file, and would keep loading it."""
    tiny_model().save_pretrained(tmp_path)
    in_4_bits(tmp_path).save_pretrained(tmp_path, max_shard_size="50KB")
    for load in (load_quantized, Checkpoint.open):
        with pytest.raises(CheckpointError, match=r"model.safetensors and model-0000.* two checkpoints"):
            load(tmp_path)


def test_variant_shards_outside_the_directory(tmp_path):
    outside = tmp_path / "outside.safetensors"
    model = tiny_model()
    model.save_pretrained(tmp_path / "in", variant="x", max_shard_size="100KB")
    model.save_pretrained(tmp_path / "of", variant="x")
    (tmp_path / "of" / "model.x.safetensors").rename(outside)
    index = tmp_path / "in" / "model.safetensors.index.x.json"
    assert load_quantized(tmp_path / "in", variant="x", device_map="cpu")
    found = json.loads(index.read_text())
    found["weight_map"] = dict.fromkeys(found["weight_map"], "../outside.safetensors")
    index.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="Files outside the directory are neither read"):
        load_quantized(tmp_path / "in", variant="x", device_map="cpu")
