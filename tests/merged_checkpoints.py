"""Bases and adapters on disk, and merges of them."""

from __future__ import annotations

import torch
import transformers
from peft import get_peft_model
from shrunken_models import shrunken_config, shrunken_model
from tiny_models import randomize_adapter, tiny_model

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.merge import merge_checkpoint


def base_model(model_type: str, dtype: torch.dtype = torch.float32):
    # square stacks: gate and up of qwen3_moe are as wide as the model, and so is gpt_oss's down projection
    if model_type not in ("llama4_text", "gemma4_text"):
        return tiny_model(model_type, dtype=dtype)
    torch.manual_seed(0)
    # with weights of the default size, all tokens are about equally likely
    if model_type == "llama4_text":
        model = transformers.Llama4ForCausalLM(shrunken_config("llama4_text")).to(dtype).eval()
        model.lm_head.weight.data *= 20
        return model
    model = shrunken_model("gemma4_text", dtype=dtype)
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight.data *= 20
    model.model.norm.weight.data *= 20
    return model


def save_adapter(directory, model_type: str = "qwen3_moe", dtype=torch.float32, std: float = 0.1, **options):
    """Saves base and adapter; returns the unmerged model."""
    base_model(model_type, dtype).save_pretrained(directory / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype)
    model = get_peft_model(model, MoeQLoraConfig(**{"r": 4, "target_modules": "all-linear", **options})).eval()
    randomize_adapter(model, std=std)
    model.save_pretrained(directory / "adapter")
    return model


def merge(directory, **options):
    out = directory / options.pop("out", "merged")
    return merge_checkpoint(directory / "base", directory / "adapter", out, progressbar=False, **options)
