"""Adapters as most readers want them: one rank, one plain scaling, and no gaps in a module that has factors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch.nn.functional import pad

from ..config import MoeQLoraConfig
from ..options import names_of
from .adapter_file import AdapterFile, InMemory, linear_scaling, save_config, save_tensors
from .base_model import BaseModel
from .gaps import exclude_pattern, find_gaps
from .non_expert import A_SUFFIX, B_SUFFIX, Pair, adapted_layers, factor_pairs


def uniform(adapter: AdapterFile, base: BaseModel) -> AdapterFile:
    """The same adapter with one rank and `alpha / r` as the scaling of everything.

    Factors are padded with zeros. Scalings that differ, by rslora or by patterns, are multiplied into B, unless it is
    all zeros. A projection that wasn't trained gets zeros where the other one was.

    Args:
        adapter: one of this package.
        base: the model that it belongs to.

    Raises:
        ValueError: the adapter has biases, embeddings or modules trained in full, which these readers don't know.
    """
    config = adapter.config
    strange = [key for key in adapter.non_expert if not key.endswith((A_SUFFIX, B_SUFFIX))]
    if strange or config.bias != "none":
        raise ValueError(
            f"The adapter has {strange[0] if strange else 'biases'}, which readers of LoRA don't know. Merge it."
        )
    linear = adapted_layers(adapter.non_expert)
    scaling_of = {name: linear_scaling(config, name) for name in linear}
    scaling_of |= {factors.name: factors.scaling for factors in adapter.experts}
    B_of = {name: adapter.non_expert[name + B_SUFFIX] for name in linear}
    B_of |= {factors.name: factors.B for factors in adapter.experts}
    # what is all zeros, such as layers that engines want beside others, has any scaling
    scalings = [scaling_of[name] for name, B in B_of.items() if B.any()] or list(scaling_of.values())
    scaling = scalings[0] if all(math.isclose(one, scalings[0]) for one in scalings) else 1.0
    r = max([factors.r for factors in adapter.experts] + [len(adapter.non_expert[name + A_SUFFIX]) for name in linear])

    def fitted(name: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        missing = r - A.shape[-2]
        if not math.isclose(scaling_of[name], scaling) and B.any():
            B = B.float() * (scaling_of[name] / scaling)  # in 16 bits it could round, or vanish
        return pad(A, (0, 0, 0, missing)), pad(B, (0, missing))

    found = {}
    for factors in adapter.experts:
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
    """The factors of linear layers under the names that the layers have in the base's checkpoint.

    Raises:
        ValueError: a layer is none of its own there.
    """
    for pair in factor_pairs(adapter.non_expert):
        name = base.name_of_linear(pair.name)
        if name is None:
            raise ValueError(
                f"{pair.name} is no layer of its own in the base's checkpoint, so that its factors have no name "
                "there. Merge the adapter, or leave the layer out of it."
            )
        yield pair._replace(name=name)


def linear_in_checkpoint(adapter: AdapterFile, base: BaseModel) -> dict[str, torch.Tensor]:
    """The tensors of `pairs_in_checkpoint`, as LoRA calls them."""
    pairs = list(pairs_in_checkpoint(adapter, base))
    return {pair.name + A_SUFFIX: pair.A for pair in pairs} | {pair.name + B_SUFFIX: pair.B for pair in pairs}


def adapted_blocks(names: Iterable[str], base: BaseModel) -> list[int] | None:
    """The numbers of the layers that have factors; None if no layer with experts is without."""
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
        directory: created if it isn't there.
        tensors: key without PEFT's prefix -> tensor.
        adapter: a uniform one.
        targets: what the config is to name as `target_modules`, by the last parts of names.
        base: the model that it belongs to.
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
