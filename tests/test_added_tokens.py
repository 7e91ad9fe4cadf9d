"""Adapters of a model with added tokens: PEFT saves its embeddings with them."""

from __future__ import annotations

import pytest
import torch
from merged_checkpoints import merge
from peft import get_peft_model
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.layouts import read_adapter


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("in_full", [None, ["embed_tokens", "lm_head"]])
def test_error_names_the_remedy(tie_word_embeddings, in_full, tmp_path):
    """A base with as many tokens loads the adapter, with the adapter's embeddings."""
    if tie_word_embeddings and in_full:
        pytest.skip("tied weights cannot be trained separately")
    tiny_model(tie_word_embeddings=tie_word_embeddings).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokens = model.config.vocab_size + 6
    model.resize_token_embeddings(tokens)
    model = get_peft_model(model, MoeQLoraConfig(r=4, modules_to_save=in_full)).eval()
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    live = logits(model, token_ids())
    with pytest.raises(ValueError, match=rf"has {tokens} tokens, but .*model\.resize_token_embeddings\({tokens}\)"):
        merge(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base.resize_token_embeddings(tokens)
    if tie_word_embeddings:  # the new rows are random
        base.set_input_embeddings(model.get_base_model().get_input_embeddings())
        base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    merge(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, token_ids()), live, rtol=0, atol=1e-5)
    assert "lm_head.weight" in " ".join(read_adapter(tmp_path / "adapter", tmp_path / "base").non_expert)
