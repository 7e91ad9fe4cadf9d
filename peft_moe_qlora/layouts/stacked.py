"""Reads LoRA on stacks of experts whose factors are 3-D, as SGLang has them by itself.

Keys are `PATH.<part>.lora_A.weight` `(E, r, in)` and `.lora_B.weight` `(E, out, r)`, with or without `.weight`, where
the parts are gate_up_proj and down_proj, or gate_proj, up_proj and down_proj. The rows of gate_up_proj's B are the
gate's and then the up projection's, whatever the order in the model. Layout: `sglang.srt.lora.mem_pool`, 0.5.23.
"""

from __future__ import annotations

import torch

from ..config import rank_and_alpha
from .adapter_file import AdapterFile
from .gate_up_halves import (
    Part,
    check_layers,
    containers_of,
    join_parts,
    others_by_own_names,
    part_names,
    with_rows_in_order,
)
from .source import Source


def read_stacked(source: Source) -> AdapterFile:
    """Reads the layout.

    Raises:
        ValueError: a factor or a layer is missing, or a tensor fits no layer of the base.
    """
    left = {_with_weight(key): tensor for key, tensor in source.tensors.items()}
    found: dict[str, dict[str, Part]] = {}
    names_of: dict[str, dict[str, str]] = {}
    for path, layout in source.base.layouts.items():
        names = {name: part for part, names in part_names(layout).items() for name in names}
        names |= {"gate_up_proj": "gate_up"} if layout.has_gate else {}
        names_of[path] = {
            f"{container}.{name}": part
            for container in containers_of(source.base, path)
            for name, part in names.items()
        }
        parts = {}
        for name, part in names_of[path].items():
            pair = [left.pop(f"{name}.lora_{factor}.weight", None) for factor in "AB"]
            if pair == [None, None]:
                continue
            parts[part] = _part(source, name, *pair)
        if "gate_up" in parts and not layout.is_concatenated:
            whole = parts["gate_up"]
            parts["gate_up"] = Part(whole.A, with_rows_in_order(whole.B, layout), whole.alpha)
        if parts:
            found[path] = parts

    def is_targeted(path: str, part: str) -> bool:
        names = [name for name, one in names_of[path].items() if one == part]
        # experts are targeted by their parts' names, even where the file has them in one
        return any(source.targets(name) for name in names) or (part == "gate_up" and is_targeted(path, "up"))

    check_layers(source, found, is_targeted)
    experts = [factors for path, parts in found.items() for factors in join_parts(source, path, parts)]
    others, names = others_by_own_names(source, left, source.targets)
    return source.adapter(experts, others, lambda name: rank_and_alpha(source.config, names[name], name))


def _with_weight(key: str) -> str:
    return f"{key}.weight" if key.endswith((".lora_A", ".lora_B")) else key


def _part(source: Source, name: str, A: torch.Tensor | None, B: torch.Tensor | None) -> Part:
    if A is None or B is None:
        raise ValueError(f"{source.file} has one of the factors lora_A and lora_B of {name} alone; it is damaged.")
    if A.dim() != 3 or B.dim() != 3 or A.shape[1] != B.shape[2]:
        raise ValueError(
            f"{source.file}: the factors of {name} have shapes {list(A.shape)} and {list(B.shape)}; (E, r, in) and "
            "(E, out, r) were expected. They are transposed, or damaged."
        )
    r, alpha = rank_and_alpha(source.config, name)
    source.check_rank(name, A.shape[1], r)
    return Part(A, B, alpha)
