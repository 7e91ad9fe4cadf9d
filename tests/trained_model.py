"""A tiny trained base, and an adapter trained on another language.

Random weights do not suffice for tests of rounding: their inputs have no preferred directions.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from tiny_models import VOCABULARY
from torch import nn

from peft_moe_qlora import MoeQLoraConfig


def sentences(language: int, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """`(batch, length)` ids of a language in which the last two words determine the next, except for one in ten."""
    rules = torch.Generator().manual_seed(language)
    following = torch.randint(3, VOCABULARY, (16, VOCABULARY, 4), generator=rules)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    for position in range(2, length):
        chosen = torch.randint(4, (batch,), generator=generator).clamp(max=2)
        expected = following[ids[:, position - 2] % 16, ids[:, position - 1], chosen]
        is_free = torch.rand(batch, generator=generator) < 0.1
        ids[:, position] = torch.where(is_free, ids[:, position], expected)
    return ids


def train(model: nn.Module, language: int, steps: int, learning_rate: float) -> None:
    """Trains all trainable parameters."""
    generator = torch.Generator().manual_seed(language)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        ids = sentences(language, 32, 24, generator)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    model.eval()


def save_trained(directory: Path, **options) -> None:
    """Writes `base` and `adapter`: a Qwen3-MoE trained on one language, and an adapter trained on another."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=4,  # all experts, so rounding in 16 bits cannot change a token's routing
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    train(model, language=1, steps=250, learning_rate=5e-3)
    model.save_pretrained(directory / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    model = get_peft_model(model, MoeQLoraConfig(**{"r": 8, "target_modules": "all-linear", **options}))
    train(model, language=2, steps=150, learning_rate=1e-2)
    model.save_pretrained(directory / "adapter")
