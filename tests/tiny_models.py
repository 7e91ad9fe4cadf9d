"""Tiny models with random weights, one for each kind of experts layout, and functions to inspect them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

VOCABULARY = 64

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OF_TYPE = {
    # (E, out, in), one key per expert on disk
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 48},
    # (E, out, in), w1/w2/w3 on disk
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    # (E, in, out), interleaved gate, biases
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 64, "layer_types": ["full_attention"] * 2},
    # shared experts in addition to the routed ones, a dense first layer
    "deepseek_v3": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    # a router that is a linear layer
    "phimoe": {"num_local_experts": 4, "intermediate_size": 32},
}


def tiny_config(model_type: str, **sizes) -> transformers.PreTrainedConfig:
    return transformers.AutoConfig.for_model(model_type, **{**_SIZES, **_OF_TYPE[model_type], **sizes})


def tiny_model(
    model_type: str = "qwen3_moe", device: str = "cpu", dtype: torch.dtype = torch.float32, std: float = 0.15, **sizes
) -> nn.Module:
    """A causal language model in evaluation mode; the same weights at every call.

    The default `std` makes experts matter for the output, but amplifies rounding from layer to layer.
    """
    config = tiny_config(model_type, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
    return model.to(device, dtype).eval()


def token_ids(device: str = "cpu", batch: int = 2, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator).to(device)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


@torch.no_grad()
def randomize_adapter(model: nn.Module, seed: int = 3, std: float = 0.1) -> None:
    """Sets every adapter tensor to random values, so no delta is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def packed_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all stored tensors of the experts."""
    keys = (".codes", "absmax", ".offset", "scales")
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith(keys)}


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert expected, "there is nothing to compare"
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
