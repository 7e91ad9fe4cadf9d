"""Adapters that change one of two layers with a tied weight: a naive merge would apply the delta to both."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from merged_checkpoints import merge
from peft import PeftModel, get_peft_model
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from torch import nn

from peft_moe_qlora import MoeQLoraConfig, load_quantized
from peft_moe_qlora.merge import merge_quantized

WITH_LORA = [{"target_modules": ["experts", "embed_tokens"]}, {"target_modules": ["experts", "lm_head"]}]
IN_FULL = [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}]


def save_adapter(directory, **options) -> PeftModel:
    tiny_model(tie_word_embeddings=True).save_pretrained(directory / "base")
    model = get_peft_model(load_base(directory), MoeQLoraConfig(r=4, **options)).eval()
    randomize_adapter(model)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory / "adapter")
    return model


def load_base(directory) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()


@pytest.mark.parametrize("options", WITH_LORA + IN_FULL, ids=str)
def test_merge_on_disk_after_untying_as_the_error_says(options, tmp_path):
    live = logits(save_adapter(tmp_path, **options), token_ids())
    with pytest.raises(ValueError, match=r"(embed_tokens|lm_head)\.weight, .* tied to it .* Untie them before"):
        merge(tmp_path)
    untied = load_base(tmp_path)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    untied.config.tie_word_embeddings = False
    untied.save_pretrained(tmp_path / "untied")
    (tmp_path / "base").rename(tmp_path / "tied")
    (tmp_path / "untied").rename(tmp_path / "base")
    merge(tmp_path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, token_ids()), live, rtol=0, atol=1e-5)
    assert (logits(load_base(tmp_path), token_ids()) - live).abs().max() > 0.1


@pytest.mark.parametrize("options", WITH_LORA, ids=str)
def test_lora_on_one_of_two_is_not_merged(options, tmp_path):
    model = save_adapter(tmp_path, **options)
    live = logits(model, token_ids())
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="is tied to it and would also change"):
            merge_quantized(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dry_run=dry_run)
    for method in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="shares its weight and would also change"):
            method()
    assert torch.equal(logits(model, token_ids()), live)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("layout", ["native", "bitsandbytes"])
@pytest.mark.parametrize("options", IN_FULL, ids=str)
def test_one_of_two_trained_in_full_is_untied_in_4_bits(options, layout, tmp_path):
    """PEFT unties them; the result contains both."""
    model = save_adapter(tmp_path, **options)
    paths = (tmp_path / name for name in ("base", "adapter", "merged"))
    merge_quantized(*paths, layout=layout, rounding="nearest", progressbar=False)
    merged = load_quantized(str(tmp_path / "merged"), dtype=torch.float32, device_map="cpu")
    expected = model.merge_and_unload(rounding="nearest")
    assert torch.equal(logits(merged, token_ids()), logits(expected, token_ids()))


def test_adapter_of_experts_keeps_them_tied(tmp_path):
    model = save_adapter(tmp_path, target_modules=["experts"])
    paths = (tmp_path / name for name in ("base", "adapter", "merged"))
    merge_quantized(*paths, rounding="nearest", progressbar=False)
    merged = load_quantized(str(tmp_path / "merged"), dtype=torch.float32, device_map="cpu")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(logits(merged, token_ids()), logits(model.merge_and_unload(rounding="nearest"), token_ids()))


def test_trained_tokens_of_one_of_two_are_not_merged(tmp_path):
    """PEFT trains tokens of both if the embedding's are requested; with the head's alone it changes only the head."""
    model = save_adapter(tmp_path, trainable_token_indices={"lm_head": [5, 6]})
    with torch.no_grad():
        model.base_model.model.lm_head.token_adapter.trainable_tokens_delta["default"] += 1
    live = logits(model, token_ids())
    for method in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"changes only lm_head, but model\.embed_tokens shares its weight"):
            method()
    assert torch.equal(logits(model, token_ids()), live)


def test_trained_tokens_of_both_are_merged(tmp_path):
    model = save_adapter(tmp_path, trainable_token_indices=[5, 6])
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"] += 1
    live = logits(model, token_ids())
    merged = copy.deepcopy(model).merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token_ids()), live, rtol=0, atol=1e-4)
