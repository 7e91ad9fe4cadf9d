"""Whole models of every type that has routed experts, shrunk to a size that a test can save and load."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_moe_qlora.experts import find_experts

# fmt: off
# every type whose default configuration can be shrunk; checkpoints of the first are not of the standard kind
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
    "unlimited_ocr", "zaya", "deepseek_v32", "glm4v_moe_text", "glm_moe_dsa", "granitemoehybrid", "hunyuan_v1_moe",
    "hy_v4_vl", "inkling2_loop_text", "lara_mini", "qwen3_omni_moe_thinker", "qwen4_exp_text",
]
# fmt: on

_SIZES = {
    "hidden_size": 64,
    "moe_hidden_size": 64,
    "moe_latent_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "expert_ffn_hidden_size": 64,
    "ffn_hidden_size": 64,
    "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "vocab_size": 128,
    "unpadded_vocab_size": 120,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "first_k_dense_replace": 0,
    "mlp_layer_types": None,
    "layer_types": None,
    "no_rope_layers": None,
    "moe_layers": None,
    "per_layer_config": {},
}
_OF_TYPE = {
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [64, 128],
        "mlp_layer_types": ["sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 2, 4]},
    },
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "llama4_text": {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "layer_types": ["attention"] * 2,
    },
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["full_attention"] * 2, "num_dense_layers": 0},
    "zaya": {"num_experts_per_tok": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_output_size": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64, "embed_dim": 64},
    "inkling_vision": {"patch_size": 2, "num_hidden_layers": 1},
}


def shrunken_config(model_type: str) -> PreTrainedConfig:
    """The default configuration of a model type, with small sizes everywhere."""
    config = AutoConfig.for_model(model_type)
    return type(config)(**_shrunken(config.to_dict()))


def _shrunken(values: dict) -> dict:
    small = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = _shrunken(value)
        elif name in _SIZES and value is not None:
            small[name] = _SIZES[name]
        else:
            small[name] = value
    small |= _OF_TYPE.get(values["model_type"], {})
    return {name: value for name, value in small.items() if value is not None and name != "transformers_version"}


# not among the automatic classes
_CLASS_OF_TYPE = {
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
    "llama4": "Llama4ForConditionalGeneration",
}


def shrunken_model(model_type: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model with random weights, experts' weights of all different."""
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
    """As `shrunken_model`; versions of transformers before 5.24 lack some types, or have them otherwise."""
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
