"""FSDP2 on a model with an adapter, without accelerate."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import fully_shard

from .layer_runner import decoder_layers

OLDEST_TORCH = "2.12"
"""The first whose `fully_shard` takes parameters of integers."""


def shard_layers(model: nn.Module, **options: Any) -> None:
    """Shards each decoder layer of a model with torch's `fully_shard`, and the rest of the model as one more unit.

    Codes and scales of experts are sharded by expert, like the factors, and never cast.

    Args:
        model: with all its adapters, alike in all processes but for what `read_part_of_experts` has left out.
        options: of `fully_shard`, such as `mesh` and `mp_policy`.

    Raises:
        RuntimeError: torch is too old.
        ValueError: the model has no decoder layers that are known as such.
    """
    if Version(Version(torch.__version__).base_version) < Version(OLDEST_TORCH):
        raise RuntimeError(
            f"FSDP2 of torch {torch.__version__} takes no parameters of integers, which codes and scales are: torch "
            f"{OLDEST_TORCH} or later was expected. Upgrade torch, or use DDP."
        )
    layers = list(decoder_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers can checkpoint, by which decoder layers are "
            "known here. Call torch.distributed.fsdp.fully_shard on its layers, and then on the model."
        )
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
