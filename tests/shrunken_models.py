"""Whole models of every type that has routed experts, shrunk to a size that a test can save and load."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from peft_moe_qlora.experts import find_experts

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


def _build(config: PreTrainedConfig, model_type: str, dtype: torch.dtype) -> nn.Module:
    if model_type in _CLASS_OF_TYPE:
        return getattr(transformers, _CLASS_OF_TYPE[model_type])._from_config(config, dtype=dtype)
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto_class._model_mapping:
            return auto_class.from_config(config, dtype=dtype)
    return transformers.AutoModel.from_config(config, dtype=dtype)
