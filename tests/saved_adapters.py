"""Bases and adapters on disk, and the deltas of the adapters."""

from __future__ import annotations

import torch
import transformers
from peft import get_peft_model
from shrunken_models import shrunken_config, shrunken_model
from tiny_models import randomize_adapter, tiny_model

from peft_moe_qlora import MoeQLoraConfig

TINY = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe")


def saved_deltas(directory, model_type: str = "qwen3_moe", **options) -> dict[str, torch.Tensor]:
    """Saves base and adapter; returns the merge delta of each weight, `(..., out, in)`."""
    model = _model(model_type)
    # published checkpoints of Qwen3.5 have fused stacks, which transformers splits when it saves
    model.save_pretrained(directory / "base", save_original_format=model_type != "qwen3_5_moe")
    model.name_or_path = str(directory / "base")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    config = MoeQLoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "quant_type": None, **options})
    model = get_peft_model(model, config)
    randomize_adapter(model)
    model.save_pretrained(directory / "adapter")
    merged = model.merge_and_unload(dtype=torch.float32)
    deltas = {name: weight.detach() - before[name] for name, weight in merged.named_parameters()}
    if model_type == "gpt_oss":  # the only one here that stores (E, in, out)
        return {name: delta.mT if delta.dim() == 3 else delta for name, delta in deltas.items()}
    return deltas


def _model(model_type: str) -> torch.nn.Module:
    if model_type in TINY:
        return tiny_model(model_type)
    if model_type == "qwen3_5_moe":  # with its vision tower, which the automatic class leaves out
        torch.manual_seed(0)
        config = shrunken_config(model_type)
        # mlx-lm expects full attention in every fourth layer
        layers = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
        config.text_config = type(config.text_config)(**{**config.text_config.to_dict(), **layers})
        return transformers.Qwen3_5MoeForConditionalGeneration(config).eval()
    return shrunken_model(model_type, dtype=torch.float32)
