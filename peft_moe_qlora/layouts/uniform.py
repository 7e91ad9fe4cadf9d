"""Adapters as most readers expect them: one rank, one plain scaling, and factors for all projections of a module."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch.nn.functional import pad
from tqdm.auto import tqdm

from ..config import MoeQLoraConfig
from ..options import names_of
from ..progress import PATIENCE
from .adapter_file import AdapterFile, InMemory, linear_scaling, save_config, save_tensors
from .base_model import BaseModel
from .gaps import exclude_pattern, find_gaps
from .non_expert import A_SUFFIX, B_SUFFIX, Pair, adapted_layers, factor_pairs


def uniform(adapter: AdapterFile, base: BaseModel) -> AdapterFile:
    """The same adapter with one rank and `alpha / r` as the only scaling.

    Factors are padded with zeros. Scalings that differ because of rslora or patterns are multiplied into B, unless it
    is all zeros. An untrained projection gets zero factors if the other projection of its module was trained.

    Args:
        adapter: an adapter of this package.
        base: the adapter's base model.

    Raises:
        ValueError: the adapter has biases, embeddings or modules trained in full, which these readers do not support.
    """
    config = adapter.config
    strange = [key for key in adapter.non_expert if not key.endswith((A_SUFFIX, B_SUFFIX))]
    if strange or config.bias != "none":
        raise ValueError(
            f"The adapter contains {strange[0] if strange else 'trained biases'}, which readers of this layout do not "
            "support. Merge the adapter instead."
        )
    linear = adapted_layers(adapter.non_expert)
    scaling_of = {name: linear_scaling(config, name) for name in linear}
    scaling_of |= {factors.name: factors.scaling for factors in adapter.experts}
    B_of = {name: adapter.non_expert[name + B_SUFFIX] for name in linear}
    B_of |= {factors.name: factors.B for factors in adapter.experts}
    # scaling does not matter where B is all zeros, as in layers added because engines fuse them with others
    scalings = [scaling_of[name] for name, B in B_of.items() if B.any()] or list(scaling_of.values())
    scaling = scalings[0] if all(math.isclose(one, scalings[0]) for one in scalings) else 1.0
    r = max([factors.r for factors in adapter.experts] + [len(adapter.non_expert[name + A_SUFFIX]) for name in linear])

    def fitted(name: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        missing = r - A.shape[-2]
        if not math.isclose(scaling_of[name], scaling) and B.any():
            B = B.float() * (scaling_of[name] / scaling)  # in 16 bits it could be rounded or underflow
        return pad(A, (0, 0, 0, missing)), pad(B, (0, missing))

    found = {}
    for factors in tqdm(adapter.experts, desc="Converting factors", unit="stack", delay=PATIENCE):
        A, B = fitted(factors.name, factors.A, factors.B)
        found[factors.name] = replace(factors, A=A, B=B, scaling=scaling, alpha=scaling * r)
    some = next(iter(found.values()))
    experts = []
    for path in dict.fromkeys(factors.path for factors in adapter.experts):
        for projection in base.layouts[path].projections:
            own = found.get(f"{path}.{projection}")
            experts.append(own or some.zeros_for(path, projection, base.layouts[path]))
    non_expert = {}
    for name in linear:
        A, B = fitted(name, adapter.non_expert[name + A_SUFFIX], adapter.non_expert[name + B_SUFFIX])
        non_expert |= {name + A_SUFFIX: A, name + B_SUFFIX: B}
    config = MoeQLoraConfig(
        r=r,
        lora_alpha=scaling * r,
        target_modules=config.target_modules,
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        revision=config.revision,
    )
    return AdapterFile(config, tuple(experts), non_expert)


def pairs_in_checkpoint(adapter: AdapterFile, base: BaseModel) -> Iterator[Pair]:
    """The factors of linear layers under the layers' names in the base's checkpoint.

    Raises:
        ValueError: the weight of a layer is not a separate tensor there.
    """
    for pair in factor_pairs(adapter.non_expert):
        name = base.name_of_linear(pair.name)
        if name is None:
            raise ValueError(
                f"The weight of {pair.name} is not a separate tensor in the base's checkpoint, so its factors have no "
                "name in this layout. Merge the adapter instead, or train one without this layer."
            )
        yield pair._replace(name=name)


def linear_in_checkpoint(adapter: AdapterFile, base: BaseModel) -> dict[str, torch.Tensor]:
    """The tensors of `pairs_in_checkpoint` under LoRA's key names."""
    pairs = list(pairs_in_checkpoint(adapter, base))
    return {pair.name + A_SUFFIX: pair.A for pair in pairs} | {pair.name + B_SUFFIX: pair.B for pair in pairs}


def adapted_blocks(names: Iterable[str], base: BaseModel) -> list[int] | None:
    """The numbers of the decoder layers that have factors; None if all layers with experts have some."""
    found = {int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)[:1]}
    with_experts = {int(number) for path in base.layouts for number in re.findall(r"\.(\d+)\.", path)[:1]}
    return None if with_experts <= found else sorted(found)


def save_lora(
    directory: Path | InMemory,
    tensors: dict[str, torch.Tensor],
    adapter: AdapterFile,
    targets: set[str],
    base: BaseModel,
) -> None:
    """Writes the two files of a LoRA adapter.

    Args:
        directory: output directory; created if it does not exist.
        tensors: key without PEFT's prefix -> tensor.
        adapter: a uniform adapter.
        targets: `target_modules` of the config, as last parts of names.
        base: the adapter's base model.
    """
    config, blocks = adapter.config, adapted_blocks(tensors, base)
    save_tensors(directory, tensors)
    written = LoraConfig(
        **{name: getattr(config, name) for name in names_of(is_written=True)},
        target_modules=sorted(targets),
        layers_to_transform=blocks,
        exclude_modules=exclude_pattern(find_gaps(adapter, base, blocks), base),
        inference_mode=True,
    )
    save_config(directory, written)
