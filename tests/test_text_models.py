"""Adapters of a text model that `AutoModelForCausalLM` loads from a checkpoint with towers."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from shrunken_models import shrunken_config
from tiny_models import randomize_adapter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.layouts import convert_adapter, read_adapter
from peft_moe_qlora.loading import load_quantized
from peft_moe_qlora.merge import merge_checkpoint, merge_quantized

WHOLE = {
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "dots3_note": "Dots3NoteForConditionalGeneration",
}
IDS = torch.arange(24).view(2, 12) + 3


def save_base(directory, model_type: str) -> torch.nn.Module:
    """Saves `base`, with its towers."""
    if model_type not in CONFIG_MAPPING or not hasattr(transformers, WHOLE[model_type]):
        pytest.skip("this version of transformers doesn't have it")
    torch.manual_seed(0)
    whole = getattr(transformers, WHOLE[model_type])._from_config(shrunken_config(model_type), dtype=torch.float32)
    whole.save_pretrained(directory / "base")
    whole.name_or_path = str(directory / "base")
    return whole


def save_trained(directory, model_type: str, **options) -> torch.Tensor:
    """Saves `base`, and `adapter` of its text model; returns the logits of both together."""
    whole = save_base(directory, model_type)
    text = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    assert type(text) is not type(whole)
    model = get_peft_model(text, MoeQLoraConfig(r=4, expert_r=2, **options))
    randomize_adapter(model)
    model.save_pretrained(directory / "adapter")
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    # its own forward fails in transformers 5.24: it requests `image_outputs` from its text model
    if isinstance(model, transformers.Llama4ForConditionalGeneration):
        model = model.language_model
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("model_type", WHOLE)
def test_merged_into_the_whole_checkpoint(model_type, quant_type, tmp_path):
    """The merged checkpoint keeps its towers, and the class named in its config gives the trained outputs."""
    trained = save_trained(tmp_path, model_type, target_modules="all-linear", quant_type=quant_type)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progressbar=False)
    merged = getattr(transformers, WHOLE[model_type]).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), trained, atol=2e-5, rtol=0)
    base = getattr(transformers, WHOLE[model_type]).from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (logits(base) - trained).abs().max() > 0.1


def test_merged_in_4_bits(tmp_path):
    """The base is loaded as the text model, which has the adapter's layers."""
    trained = save_trained(tmp_path, "qwen3_5_moe", target_modules=["experts"])
    report = merge_quantized(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progressbar=False)
    assert report.tensors_changed == report.tensors_expected == 4
    merged = load_quantized(str(tmp_path / "merged"), dtype=torch.float32, device_map="cpu")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (logits(merged) - trained).norm() < 0.5 * (logits(base) - trained).norm()


@pytest.mark.parametrize("target", ["per-expert", "vllm", "mlx"])
def test_converted_to_names_of_the_whole_model(target, tmp_path):
    """Engines serve the class that the checkpoint's config names, and drop other names."""
    head = [] if target == "mlx" else ["lm_head"]  # its name in mlx-lm is unknown
    save_trained(tmp_path, "qwen3_5_moe", quant_type=None, target_modules=["experts", "out_proj", *head])
    own = read_adapter(tmp_path / "adapter", tmp_path / "base")
    convert_adapter(tmp_path / "adapter", tmp_path / "out", target, tmp_path / "base")
    found = read_adapter(tmp_path / "out", tmp_path / "base")
    assert [one.name for one in found.experts] == [
        one.name.replace("model.", "model.language_model.") for one in own.experts
    ]
    for one, expected in zip(found.experts, own.experts):
        torch.testing.assert_close(one.scaling * one.B @ one.A, expected.scaling * expected.B @ expected.A)
    assert {key for key in found.non_expert if found.non_expert[key].any()} == {
        key.replace("model.", "model.language_model.") for key in own.non_expert
    }


def test_adapter_of_the_whole_model(tmp_path):
    """The checkpoint of dots3_note has the same layer names as its text model, but also audio layers."""
    whole = save_base(tmp_path, "dots3_note")
    model = get_peft_model(whole, MoeQLoraConfig(r=4, target_modules="all-linear", quant_type=None))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "out", "per-expert", tmp_path / "base")
    found = read_adapter(tmp_path / "out", tmp_path / "base")
    own = read_adapter(tmp_path / "adapter", tmp_path / "base")
    assert found.stacks == own.stacks
    assert found.non_expert.keys() == own.non_expert.keys()


def test_stock_peft_loads_it_on_the_text_model(tmp_path):
    """Without an engine that determines the class, it stays the trained one."""
    trained = save_trained(tmp_path, "qwen3_5_moe", quant_type=None)
    convert_adapter(tmp_path / "adapter", tmp_path / "out", "peft-lora", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "out")), trained, atol=1e-5, rtol=0)
