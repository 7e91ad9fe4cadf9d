"""An adapter's non-expert tensors: LoRA on linear layers and embeddings, modules trained in full, trained tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
PAIRS = ((A_SUFFIX, B_SUFFIX), (EMBEDDING_A, EMBEDDING_B))
LORA = (*PAIRS[0], *PAIRS[1])
"""Suffixes of the keys of factors."""

TOKENS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
"""Suffixes of the keys of trained tokens."""


def adapted_layers(keys: dict[str, torch.Tensor]) -> list[str]:
    """The linear layers and embeddings named by LoRA keys, in the order of the keys."""
    return [key.removesuffix(suffix) for key in keys for suffix in (A_SUFFIX, EMBEDDING_A) if key.endswith(suffix)]


def adapted_weights(keys: dict[str, torch.Tensor]) -> list[str]:
    """The names of the weights that LoRA changes."""
    return [f"{name}.weight" for name in adapted_layers(keys)]


class Pair(NamedTuple):
    """The factors of one layer.

    Args:
        name: name of the layer.
        A: `(r, in)`; `(r, rows)` for an embedding.
        B: `(out, r)`; `(features, r)` for an embedding.
        is_embedding: whether the layer is an embedding, whose delta is `(B @ A).T`.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    is_embedding: bool

    @property
    def has_delta(self) -> bool:
        return bool(self.A.any() and self.B.any())


def factor_pairs(non_expert: dict[str, torch.Tensor]) -> Iterator[Pair]:
    """The factors of all linear layers and embeddings."""
    for key, A in non_expert.items():
        for a, b in PAIRS:
            if key.endswith(a):
                name = key.removesuffix(a)
                yield Pair(name, A, non_expert[name + b], a == EMBEDDING_A)


def beside_factors(non_expert: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors except factors: key -> tensor of biases, modules trained in full and tokens."""
    return {key: tensor for key, tensor in non_expert.items() if not key.endswith(LORA) and not is_unused_copy(key)}


def name_in_model(key: str) -> str:
    """Name in the model of a tensor that was trained in full; biases are saved under PEFT's wrapped layers."""
    for wrapped in (".base_layer.", ".modules_to_save.", ".original_module."):
        key = key.replace(wrapped, ".")
    return key


def is_unused_copy(key: str) -> bool:
    """Whether a tensor belongs to the untrained copy of a fully trained module; PEFT saves its bias among others."""
    return ".original_module." in key
