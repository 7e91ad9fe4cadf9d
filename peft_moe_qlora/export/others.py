"""What an adapter has beside experts: LoRA on linear layers and embeddings, modules trained in full, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import nn

from .base_model import BaseModel

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_PAIRS = ((A_SUFFIX, B_SUFFIX), (EMBEDDING_A, EMBEDDING_B))
TOKENS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
"""What the keys of trained tokens end with."""


def adapted_layers(keys: dict[str, torch.Tensor]) -> list[str]:
    """The linear layers and embeddings that LoRA's keys name, in their order."""
    return [key.removesuffix(suffix) for key in keys for suffix in (A_SUFFIX, EMBEDDING_A) if key.endswith(suffix)]


class Pair(NamedTuple):
    """The factors of one layer.

    Args:
        name: of the layer.
        A: `(r, in)`; of an embedding `(r, rows)`.
        B: `(out, r)`; of an embedding `(features, r)`.
        is_embedding: then the delta is `(B @ A).T`.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    is_embedding: bool

    @property
    def has_delta(self) -> bool:
        return bool(self.A.any() and self.B.any())


def factor_pairs(others: dict[str, torch.Tensor]) -> Iterator[Pair]:
    """The factors of all linear layers and embeddings."""
    for key, A in others.items():
        for a, b in _PAIRS:
            if key.endswith(a):
                name = key.removesuffix(a)
                yield Pair(name, A, others[name + b], a == EMBEDDING_A)


def beside_factors(others: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is no factor: key -> tensor of biases, modules trained in full and tokens."""
    suffixes = tuple(suffix for pair in _PAIRS for suffix in pair)
    return {key: tensor for key, tensor in others.items() if not key.endswith(suffixes) and not is_unused_copy(key)}


def name_in_model(key: str) -> str:
    """What a tensor that was trained in full is called in the model; biases stand in what PEFT has wrapped."""
    for wrapped in (".base_layer.", ".modules_to_save.", ".original_module."):
        key = key.replace(wrapped, ".")
    return key


def is_unused_copy(key: str) -> bool:
    """Whether a tensor is of a module as it was before it was trained in full, which PEFT saves with its bias."""
    return ".original_module." in key


def check_others(file: Path, config: LoraConfig, others: dict[str, torch.Tensor], base: BaseModel | None) -> None:
    """Refuses tensors that nothing would take.

    Args:
        file: for errors.
        config: the adapter's.
        others: key without PEFT's prefix -> tensor.
        base: what the adapter belongs to; None if that isn't known, which leaves shapes and places unchecked.

    Raises:
        ValueError: names the first key that lacks its other half, is none of an adapter, or doesn't fit the base.
    """
    for key in others:
        for a, b in _PAIRS:
            for own, other in ((a, b), (b, a)):
                if key.endswith(own) and key.removesuffix(own) + other not in others:
                    raise ValueError(f"{file} has {key}, but not {key.removesuffix(own)}{other}; it is damaged.")
    for name in adapted_layers(others):
        if base is not None:
            _check_layer(file, name, others, base)
    saved = config.modules_to_save or ()
    for name in [saved] if isinstance(saved, str) else saved:
        if not any(f"{name}." in key for key in others):
            raise ValueError(
                f"{file} has no tensor of {name}, which its config has in modules_to_save; it is damaged."
            )
    lora = (*_PAIRS[0], *_PAIRS[1])
    for key, tensor in others.items():
        if key.endswith(lora) or _is_known(config, key):
            if base is not None and not key.endswith((*lora, *TOKENS)):
                _check_full(file, key, tensor, base)
            continue
        raise ValueError(
            f"{file}: {key} is nothing that this adapter's config asks for. The file is damaged, or of a format that "
            "is not read; remove the tensor if it isn't needed."
        )


def _is_known(config: LoraConfig, key: str) -> bool:
    saved = config.modules_to_save or ()
    return (
        any(f"{name}." in key for name in saved)  # PEFT takes every module whose name ends so
        or (config.bias != "none" and key.endswith("bias"))
        or (config.trainable_token_indices is not None and key.endswith(TOKENS))
    )


def _check_layer(file: Path, name: str, others: dict[str, torch.Tensor], base: BaseModel) -> None:
    layer = base.layer(name)
    if layer is None:
        raise ValueError(
            f"{file}: {name} has factors, but {base.directory} has no linear layer or embedding of that name. "
            "The adapter belongs to another base, or adapts a router, which has to be left out."
        )
    is_embedding = isinstance(layer, nn.Embedding)
    rows, columns = layer.weight.shape
    if is_embedding:
        rows, columns = columns, rows
    a, b = _PAIRS[is_embedding]
    if name + a not in others:
        raise ValueError(f"{file}: {name} is a {type(layer).__name__}; factors {name}{a} were expected.")
    A, B = others[name + a], others[name + b]
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != columns or B.shape[0] != rows or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{file}: {name}{a} {list(A.shape)} and {name}{b} {list(B.shape)} don't fit {base.directory}, where "
            f"(r, {columns}) and ({rows}, r) were expected. They are transposed, or of another base."
        )


def _check_full(file: Path, key: str, tensor: torch.Tensor, base: BaseModel) -> None:
    expected = base.shape_of(name_in_model(key))
    if expected != tuple(tensor.shape):
        raise ValueError(
            f"{file}: {key} has shape {tuple(tensor.shape)}; {base.directory} has "
            f"{'no such tensor' if expected is None else f'{expected} there'}. The adapter belongs to another base."
        )
