"""Reads LoRA on one linear layer per expert: what PEFT made while experts were linear layers, and what is served.

Keys are `PATH.<expert>.<part>.lora_A.weight` `(r, in)` and `.lora_B.weight` `(out, r)`, where PATH is that of the
model or of its checkpoint, and the parts are gate_proj, up_proj, down_proj or w1, w3, w2. Layout: peft on transformers
before version 5.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from ..config import rank_and_alpha
from .adapter_file import AdapterFile
from .gate_up_halves import Part, check_layers, join_parts, names_of_parts, others_by_own_names
from .non_expert import A_SUFFIX, B_SUFFIX
from .source import Source


def read_per_expert(source: Source) -> AdapterFile:
    """Reads the layout.

    Raises:
        ValueError: an expert lacks what others of its module have, its rank or alpha differs from theirs, or a tensor
            fits no layer of the base. A projection may be absent from all experts of all layers.
    """
    left = dict(source.tensors)
    found: dict[str, dict[str, Part]] = {}
    names_of: dict[str, dict[str, tuple[int, str]]] = {}
    for path in source.base.layouts:
        names_of[path] = names_of_parts(source.base, path)
        of_part: dict[str, dict[int, str]] = defaultdict(dict)
        for name, (expert, part) in names_of[path].items():
            if name + A_SUFFIX in left or name + B_SUFFIX in left:
                if expert in of_part[part]:
                    raise ValueError(f"{source.file}: {name} and {of_part[part][expert]} are the same layer.")
                of_part[part][expert] = name
        if of_part:
            found[path] = {part: _part(source, left, path, part, names) for part, names in of_part.items()}

    def is_targeted(path: str, part: str) -> bool:
        return any(
            source.targets(name) for name, (expert, one) in names_of[path].items() if (expert, one) == (0, part)
        )

    check_layers(source, found, is_targeted)
    experts = [factors for path, parts in found.items() for factors in join_parts(source, path, parts)]
    others, names = others_by_own_names(source, left, source.targets)
    return source.adapter(experts, others, lambda name: rank_and_alpha(source.config, names[name], name))


def _part(source: Source, left: dict[str, torch.Tensor], path: str, part: str, names: dict[int, str]) -> Part:
    """Stacks the factors of all experts, taking them out of what is left."""
    num_experts = source.base.layouts[path].num_experts
    missing = sorted(set(range(num_experts)) - names.keys())
    if missing:
        raise ValueError(
            f"{source.file} has no {part} projection of expert {missing[0]} of {path}, but of "
            f"{len(names)} of its {num_experts} experts. It is damaged; factors of all experts were expected."
        )
    pairs, settled = [], set()
    for expert in range(num_experts):
        name = names[expert]
        absent = [name + suffix for suffix in (A_SUFFIX, B_SUFFIX) if name + suffix not in left]
        if absent:
            raise ValueError(f"{source.file} has no {absent[0]}, but the other factor of it; it is damaged.")
        A, B = left.pop(name + A_SUFFIX), left.pop(name + B_SUFFIX)
        r, alpha = rank_and_alpha(source.config, name)
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{source.file}: {name}{A_SUFFIX} {list(A.shape)} and {name}{B_SUFFIX} {list(B.shape)} are not "
                f"(r, in) and (out, r) of rank {r}. They are transposed, or damaged."
            )
        source.check_rank(name, A.shape[0], r)
        pairs.append((A, B))
        settled.add((r, alpha, A.shape[1], B.shape[0], A.dtype))
    if len(settled) > 1:
        raise ValueError(
            f"{source.file}: the {part} projections of {path} differ in rank, alpha, size or dtype from expert to "
            f"expert: {sorted(map(str, settled))}. They are one stack here, which has one of each."
        )
    return Part(torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs]), alpha)
