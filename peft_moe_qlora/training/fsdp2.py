"""FSDP2 on a model with an adapter, without accelerate."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import fully_shard

from .layer_runner import decoder_layers

OLDEST_TORCH = "2.12"
"""First version in which `fully_shard` supports integer parameters."""


def shard_layers(model: nn.Module, **options: Any) -> None:
    """Shards each decoder layer of a model with torch's `fully_shard`, and the rest of the model as another unit.

    Codes and scales of experts are sharded by expert, like the factors, and never cast.

    Args:
        model: model with all its adapters, the same in all processes except for experts that `read_part_of_experts`
            has skipped.
        options: arguments of `fully_shard`, such as `mesh` and `mp_policy`.

    Raises:
        RuntimeError: torch is too old.
        ValueError: the model has no `GradientCheckpointingLayer`.
    """
    if Version(Version(torch.__version__).base_version) < Version(OLDEST_TORCH):
        raise RuntimeError(
            f"FSDP2 of torch {torch.__version__} does not support integer parameters, such as codes and scales. "
            f"Expected torch {OLDEST_TORCH} or later. Upgrade torch, or use DDP."
        )
    layers = list(decoder_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no GradientCheckpointingLayer, by which decoder layers are found. Call "
            "torch.distributed.fsdp.fully_shard on its layers, and then on the model."
        )
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
