"""Tiny models prepared for training, with an adapter, their batches, and a training loop."""

from __future__ import annotations

import torch
from peft import get_peft_model
from tiny_models import randomize_adapter, tiny_model
from torch import nn

from peft_moe_qlora import MoeQLoraConfig, prepare_model_for_training

POLICIES = [True, "keep-experts", False]
"""Values of `use_gradient_checkpointing`."""


def trained_model(
    device: str,
    dtype: torch.dtype = torch.float32,
    lora_dropout: float = 0.0,
    model_type: str = "qwen3_moe",
    **options,
) -> nn.Module:
    model = tiny_model(model_type, device, dtype)
    prepare_model_for_training(model, **options)
    config = MoeQLoraConfig(
        r=4, target_modules=["experts", "q_proj", "k_proj", "v_proj", "o_proj"], lora_dropout=lora_dropout
    )
    model = get_peft_model(model, config)
    randomize_adapter(model)
    return model.train()


def batch(device: str, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two sequences, the first padded on the left."""
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(seed)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], autocast: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses, and the factors after the steps."""
    torch.manual_seed(5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for inputs in batches:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return losses, [parameter.detach() for parameter in trained]
