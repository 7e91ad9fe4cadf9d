"""Checks that an adapter's non-expert tensors match its config and its base model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from ..targets import may_be_absent, parents
from .base_model import BaseModel
from .non_expert import LORA, PAIRS, TOKENS, adapted_layers, name_in_model

_EMBEDDINGS = tuple(f"{name}.weight" for name in EMBEDDING_LAYER_NAMES)
"""PEFT saves these, trained or not, if tokens were added (`save_embedding_layers`)."""


def check_non_expert(
    file: Path, config: LoraConfig, non_expert: dict[str, torch.Tensor], base: BaseModel | None
) -> None:
    """Rejects unexpected tensors, and a file that lacks non-LoRA tensors which its config requires.

    Args:
        file: name of the file for errors.
        config: the adapter's config.
        non_expert: key without PEFT's prefix -> tensor.
        base: the adapter's base model; None if unknown, in which case shapes and layer names are not checked.

    Raises:
        ValueError: a factor lacks its counterpart, or a tensor is unexpected, missing or does not fit the base. The
            error names the first such key.
    """
    for key in non_expert:
        for a, b in PAIRS:
            for own, other in ((a, b), (b, a)):
                if key.endswith(own) and key.removesuffix(own) + other not in non_expert:
                    raise ValueError(
                        f"{file} contains {key}, but not {key.removesuffix(own)}{other}. The file is damaged. Save "
                        "the adapter again."
                    )
    for name in adapted_layers(non_expert):
        if base is not None:
            _check_layer(file, name, non_expert, base)
    _check_saved_modules(file, config, non_expert, base)
    _check_tokens(file, config, non_expert, base)
    for key, tensor in non_expert.items():
        if key.endswith(LORA) or _is_known(config, key):
            if base is not None and not key.endswith((*LORA, *TOKENS)):
                _check_full(file, key, tensor, base)
            continue
        raise ValueError(
            f"{file}: the adapter's config does not call for the tensor {key}. The file is damaged or has an "
            "unsupported format. Remove the tensor if it is not needed."
        )


def _check_saved_modules(
    file: Path, config: LoraConfig, non_expert: dict[str, torch.Tensor], base: BaseModel | None
) -> None:
    keys = [name_in_model(key) for key in non_expert if not key.endswith((*LORA, *TOKENS))]

    def is_saved(name: str) -> bool:
        return any(f"{name}." in key for key in keys)

    for name in config.modules_to_save or ():
        if not is_saved(name) and may_be_absent(name, config, is_saved):
            continue
        missing = None if is_saved(name) else name
        if base is not None and missing is None:
            # PEFT matches every module by the end of its name, but of nested matches saves only the inner one
            modules = {path: module for path, module in base.model.named_modules() if path.endswith(name)}
            around = {parent for path in modules for parent in parents(path)}
            innermost = {path: module for path, module in modules.items() if path not in around}
            wanted = [f"{path}.{key}" for path, module in innermost.items() for key, _ in module.named_parameters()]
            missing = next((key for key in wanted if key not in keys), None)
        if missing is not None:
            raise ValueError(
                f"{file} contains no tensor of {missing}, which its config lists in modules_to_save. The file is "
                "damaged. Save the adapter again."
            )


def _check_tokens(file: Path, config: LoraConfig, non_expert: dict[str, torch.Tensor], base: BaseModel | None) -> None:
    wanted = config.trainable_token_indices
    if not wanted:
        return
    found = {}
    for key, tensor in non_expert.items():
        if key.endswith(TOKENS):
            found[key.removesuffix(TOKENS[0]).removesuffix(TOKENS[1])] = tensor
    # PEFT saves only one of several tied layers
    may_be_tied = base is None or base.model.config.get_text_config().tie_word_embeddings
    for layer, indices in wanted.items() if isinstance(wanted, dict) else [("", wanted)]:
        names = [name for name in found if layer in ("", name) or name.endswith(f".{layer}")]
        if not names and not (found and may_be_tied):
            raise ValueError(
                f"{file} contains no tensor of trained tokens{f' of {layer}' if layer else ''}, which its config "
                "lists in trainable_token_indices. The file is damaged. Save the adapter again."
            )
        for name in names:
            _check_token_rows(file, name, found[name], len(indices), base)


def _check_token_rows(file: Path, name: str, rows: torch.Tensor, num_tokens: int, base: BaseModel | None) -> None:
    expected = f"({num_tokens}, features)"
    fits = rows.dim() == 2 and len(rows) == num_tokens
    if base is not None:
        layer = base.layer(name)
        if layer is None:
            raise ValueError(
                f"{file} contains trained tokens of {name}, but {base.directory} has no embedding with this name. The "
                "adapter belongs to another base model. Use the adapter's own base model."
            )
        expected = (num_tokens, layer.weight.shape[1])
        fits = tuple(rows.shape) == expected
    if not fits:
        raise ValueError(
            f"{file}: the trained tokens of {name} have shape {tuple(rows.shape)}. Expected {expected} from "
            "trainable_token_indices of its config. The file and the config belong to different adapters. Save the "
            "adapter again."
        )


def check_targeted(file: Path, names: Iterable[str], is_targeted: Callable[[str], bool]) -> None:
    """Rejects factors of layers that the config does not target: some loaders drop them, others apply them.

    Args:
        file: name of the file for errors.
        names: names of the layers that have factors.
        is_targeted: whether the config targets a layer.

    Raises:
        ValueError: there are such factors; the error names the first layer.
    """
    strange = [name for name in names if not is_targeted(name)]
    if strange:
        raise ValueError(
            f"{file} contains factors of {strange[0]}, which its config does not target (target_modules, "
            "exclude_modules, layers_to_transform, target_parameters). The file is damaged or belongs to another "
            "adapter. Save the adapter again."
        )


def _is_known(config: LoraConfig, key: str) -> bool:
    saved = config.modules_to_save or ()
    if key.endswith(_EMBEDDINGS):
        return True
    return (
        any(f"{name}." in key for name in saved)  # PEFT matches modules by the end of their names
        or (config.bias != "none" and key.endswith("bias"))
        or (config.trainable_token_indices is not None and key.endswith(TOKENS))
    )


def _check_layer(file: Path, name: str, non_expert: dict[str, torch.Tensor], base: BaseModel) -> None:
    layer = base.layer(name)
    if layer is None:
        raise ValueError(
            f"{file} contains factors of {name}, but {base.directory} has no linear layer or embedding with this "
            "name. The adapter belongs to another base model, or it adapts a router, which is not supported."
        )
    is_embedding = isinstance(layer, nn.Embedding)
    rows, columns = layer.weight.shape
    if is_embedding:
        rows, columns = columns, rows
    a, b = PAIRS[is_embedding]
    if name + a not in non_expert:
        raise ValueError(f"{file}: {name} is a layer of class {type(layer).__name__}. Expected factors {name}{a}.")
    A, B = non_expert[name + a], non_expert[name + b]
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != columns or B.shape[0] != rows or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{file}: {name}{a} has shape {list(A.shape)} and {name}{b} {list(B.shape)}. Expected (r, {columns}) and "
            f"({rows}, r) for {base.directory}. The factors are transposed or belong to another base model. Use the "
            "adapter's own base model."
        )


def _check_full(file: Path, key: str, tensor: torch.Tensor, base: BaseModel) -> None:
    expected, found = base.shape_of(name_in_model(key)), tuple(tensor.shape)
    if expected == found:
        return
    if name_in_model(key).endswith(_EMBEDDINGS) and expected is not None and expected[1:] == found[1:]:
        raise ValueError(
            f"{file}: {key} has {found[0]} tokens, but {base.directory} has {expected[0]}: tokens were added in "
            f"training. Add them to the base model with model.resize_token_embeddings({found[0]}), save it, and pass "
            "that directory as the base."
        )
    raise ValueError(
        f"{file}: {key} has shape {found}, but {base.directory} has "
        f"{'no such tensor' if expected is None else f'shape {expected}'}. The adapter belongs to another base "
        "model. Use the adapter's own base model."
    )
