"""Whole models of every type that has routed experts, shrunk to a size that a test can save and load."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from small_sizes import OF_TYPE, SIZES
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_moe_qlora.experts import find_experts

# fmt: off
# every type whose default configuration can be shrunk; checkpoints of the first have a nonstandard layout
MODEL_TYPES = [
    "ernie4_5_vl_moe", "qwen3_vl_moe", "inkling_mm_model", "inkling2_text", "inkling_text", "minimax_m3_vl",
    "nemotron_h", "dots3_note", "diffusion_gemma", "llama4", "aria",
    "granitemoe", "nemotron_h_omni", "kimi_k25", "qwen3_vl_moe_text", "dots3_note_text", "afmoe", "aria_text",
    "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4",
    "ernie4_5_moe", "exaone_moe", "flex_olmo", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite",
    "glm4v_moe", "gpt_oss", "granitemoe_swa", "granitemoeshared", "hy_v3", "hy_v4", "jamba", "kimi_linear",
    "kolibri1", "laguna", "lfm2_moe", "llama4_text", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "mistral4", "mixtral", "muse_spark_text", "olmoe", "openai_privacy_filter", "phimoe",
    "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp", "solar_open",
    "unlimited_ocr", "zaya", "beam", "deepseek_ocr2", "deepseek_v32", "dots1", "flint", "glm4v_moe_text",
    "glm5_next", "glm5_next_text", "glm_moe_dsa", "granitemoehybrid", "hunyuan_v1_moe", "hy_v4_vl", "hy_v4_vl_text",
    "inkling2", "inkling2_loop", "inkling2_loop_text", "lara_mini", "mistral_large4", "mistral_large4_text",
    "muse_spark", "nemo_speechlm", "qwen3_omni_moe_thinker", "qwen4_exp_text",
]
# fmt: on


def shrunken_config(model_type: str) -> PreTrainedConfig:
    """The default configuration of a model type, with small sizes everywhere."""
    config = AutoConfig.for_model(model_type)
    return type(config)(**_shrunken(config.to_dict()))


def _shrunken(values: dict) -> dict:
    small = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = _shrunken(value)
        elif name in SIZES and value is not None:
            small[name] = SIZES[name]
        else:
            small[name] = value
    small |= OF_TYPE.get(values["model_type"], {})
    return {name: value for name, value in small.items() if value is not None and name != "transformers_version"}


# not among the automatic classes
_CLASS_OF_TYPE = {
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
    "llama4": "Llama4ForConditionalGeneration",
}


def shrunken_model(model_type: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model with random weights; the weights of all experts differ."""
    config = shrunken_config(model_type)
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        model = _build(config, model_type, dtype)
        for _, module in find_experts(model):
            for parameter in module.parameters():
                if not parameter.is_meta:
                    nn.init.normal_(parameter, std=0.1)
    return model.eval()


def shrunken_model_or_skip(model_type: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """As `shrunken_model`; skips types that versions of transformers before 5.24 lack or define differently."""
    try:
        missing = None if model_type in CONFIG_MAPPING else "it"
        model = None if missing else shrunken_model(model_type, dtype=dtype)
    except (TypeError, ValueError, AttributeError):
        if Version(transformers.__version__) >= Version("5.24"):
            raise
        missing = "this configuration of it"
    if missing is None and not list(find_experts(model)):
        missing = "its experts fused"
    if missing is not None:
        assert Version(transformers.__version__) < Version("5.24")
        pytest.skip(f"this version of transformers doesn't have {missing}")
    return model


def _build(config: PreTrainedConfig, model_type: str, dtype: torch.dtype) -> nn.Module:
    if model_type in _CLASS_OF_TYPE:
        return getattr(transformers, _CLASS_OF_TYPE[model_type])._from_config(config, dtype=dtype)
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto_class._model_mapping:
            return auto_class.from_config(config, dtype=dtype)
    return transformers.AutoModel.from_config(config, dtype=dtype)
