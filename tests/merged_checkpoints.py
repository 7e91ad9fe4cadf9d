"""Bases and adapters on disk, merges of them, and the logits of the result in stock transformers."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import torch
import transformers
from peft import get_peft_model
from shrunken_models import shrunken_config, shrunken_model
from tiny_models import randomize_adapter, tiny_model

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.merge import merge_checkpoint

STOCK = """
    import sys
    sys.modules["peft_moe_qlora"] = None  # can't be imported
    import torch, transformers
    directory, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/merged", dtype=dtype).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(f"{directory}/ids.pt")).logits, f"{directory}/logits.pt")
"""


def stock_logits(directory, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits of the merged model, in a process that imports transformers only."""
    torch.save(ids, directory / "ids.pt")
    command = [sys.executable, "-c", textwrap.dedent(STOCK), str(directory), str(dtype).removeprefix("torch.")]
    subprocess.run(command, check=True, capture_output=True)
    return torch.load(directory / "logits.pt")


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
