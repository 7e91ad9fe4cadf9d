"""Layers without factors while others of their kind have some, such as those of `exclude_modules`.

Targets are written as the last parts of names, which would match these layers too.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from .adapter_file import AdapterFile
from .base_model import BaseModel
from .foreign import kind
from .gate_up_halves import containers_of
from .non_expert import A_SUFFIX, B_SUFFIX, adapted_layers


class Gaps(NamedTuple):
    """The layers that an adapter leaves out.

    Args:
        layers: names of linear layers in the model.
        experts: paths of experts modules.
    """

    layers: list[str]
    experts: list[str]


def find_gaps(adapter: AdapterFile, base: BaseModel, blocks: list[int] | None) -> Gaps:
    """Finds the layers that an adapter leaves out.

    Args:
        adapter: a uniform adapter (`uniform`).
        base: the adapter's base model.
        blocks: the numbers of the decoder layers that the written config targets; None for all.
    """
    linear = adapted_layers(adapter.non_expert)
    experts = {factors.path for factors in adapter.experts}
    kinds = {kind(name) for name in (*linear, *experts)}

    def is_gap(name: str) -> bool:
        block = re.search(r"\.(\d+)\.", name)
        is_reached = blocks is None or block is None or int(block[1]) in blocks
        return is_reached and kind(name) in kinds and name not in linear and name not in experts

    return Gaps([name for name in base.layers() if is_gap(name)], [path for path in base.layouts if is_gap(path)])


def exclude_pattern(gaps: Gaps, base: BaseModel) -> str | None:
    """`exclude_modules` that matches the gaps by their names in the model and its checkpoint; None without gaps."""
    layers = [name for layer in gaps.layers for name in (layer, base.name_of_linear(layer)) if name is not None]
    experts = [container for path in gaps.experts for container in sorted(containers_of(base, path))]
    patterns = [re.escape(name) for name in layers] + [rf"{re.escape(name)}(\.\d+)?\.\w+" for name in experts]
    return "|".join(dict.fromkeys(patterns)) or None


def without_gaps(adapter: AdapterFile, gaps: Gaps, base: BaseModel) -> AdapterFile:
    """The same adapter with zero factors in the gaps, for readers that do not support excluding layers."""
    some, r = adapter.experts[0], adapter.config.r
    added = [
        some.zeros_for(path, name, base.layouts[path])
        for path in gaps.experts
        for name in base.layouts[path].projections
    ]
    non_expert = dict(adapter.non_expert)
    for name in gaps.layers:
        rows, columns = base.layer(name).weight.shape
        non_expert[name + A_SUFFIX] = some.A.new_zeros(r, columns)
        non_expert[name + B_SUFFIX] = some.A.new_zeros(rows, r)
    return replace(adapter, experts=(*adapter.experts, *added), non_expert=non_expert)
