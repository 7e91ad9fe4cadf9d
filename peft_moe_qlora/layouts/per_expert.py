"""One LoRA per expert and projection: PEFT's layout for experts as linear layers, which most engines serve.

Keys are `PATH.<expert>.<part>.lora_A.weight` `(r, in)` and `.lora_B.weight` `(out, r)`, where PATH is that of the
model or of its checkpoint, and the parts are gate_proj, up_proj, down_proj or w1, w3, w2. The writer uses the
checkpoint's names, and the same A for gate and up projection. Layout: peft on transformers before version 5.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from ..config import rank_and_alpha
from .adapter_file import AdapterFile
from .base_model import BaseModel
from .foreign import ForeignAdapter
from .gate_up_halves import Part, check_layers, gate_and_up, join_parts, names_of_parts, non_expert_by_own_names
from .non_expert import A_SUFFIX, B_SUFFIX
from .uniform import linear_in_checkpoint, save_lora, uniform
from .whole_model import in_whole_model


def read_per_expert(foreign: ForeignAdapter) -> AdapterFile:
    """Reads the layout.

    Raises:
        ValueError: an expert lacks factors that others of its module have, its rank or alpha differs from theirs, or a
            tensor fits no layer of the base. A projection may be absent from all experts of all layers.
    """
    left = dict(foreign.tensors)
    found: dict[str, dict[str, Part]] = {}
    names_of: dict[str, dict[str, tuple[int, str]]] = {}
    for path in foreign.base.layouts:
        names_of[path] = names_of_parts(foreign.base, path)
        of_part: dict[str, dict[int, str]] = defaultdict(dict)
        for name, (expert, part) in names_of[path].items():
            if name + A_SUFFIX in left or name + B_SUFFIX in left:
                if expert in of_part[part]:
                    raise ValueError(
                        f"{foreign.file}: {name} and {of_part[part][expert]} are names of the same layer. Remove one "
                        "of them."
                    )
                of_part[part][expert] = name
        if of_part:
            found[path] = {part: _part(foreign, left, path, part, names) for part, names in of_part.items()}

    def is_targeted(path: str, part: str) -> bool:
        return any(
            foreign.targets(name) for name, (expert, one) in names_of[path].items() if (expert, one) == (0, part)
        )

    check_layers(foreign, found, is_targeted)
    experts = [factors for path, parts in found.items() for factors in join_parts(foreign, path, parts)]
    non_expert, names = non_expert_by_own_names(foreign, left, foreign.targets)
    return foreign.adapter(experts, non_expert, lambda name: rank_and_alpha(foreign.config, names[name], name))


def _part(foreign: ForeignAdapter, left: dict[str, torch.Tensor], path: str, part: str, names: dict[int, str]) -> Part:
    """Stacks the factors of all experts and removes them from `left`."""
    num_experts = foreign.base.layouts[path].num_experts
    missing = sorted(set(range(num_experts)) - names.keys())
    if missing:
        raise ValueError(
            f"{foreign.file} contains no factors of the {part} projection of expert {missing[0]} of {path}. Expected "
            f"factors of all {num_experts} experts, found {len(names)}. The file is damaged. Save the adapter again."
        )
    pairs, settled = [], set()
    for expert in range(num_experts):
        name = names[expert]
        absent = [name + suffix for suffix in (A_SUFFIX, B_SUFFIX) if name + suffix not in left]
        if absent:
            raise ValueError(
                f"{foreign.file} contains no {absent[0]}, but the other factor of the layer. The file is damaged. "
                "Save the adapter again."
            )
        A, B = left.pop(name + A_SUFFIX), left.pop(name + B_SUFFIX)
        r, alpha = rank_and_alpha(foreign.config, name)
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{foreign.file}: {name}{A_SUFFIX} has shape {list(A.shape)} and {name}{B_SUFFIX} {list(B.shape)}. "
                f"Expected (r, in) and (out, r) with rank {r}. The factors are transposed, or the file is damaged. "
                "Save the adapter again."
            )
        foreign.check_rank(name, A.shape[0], r)
        pairs.append((A, B))
        settled.add((r, alpha, A.shape[1], B.shape[0], A.dtype))
    if len(settled) > 1:
        raise ValueError(
            f"{foreign.file}: the {part} projections of {path} differ in rank, alpha, size or dtype between experts: "
            f"{sorted(map(str, settled))}. Expected the same values for all experts, which are one stack here."
        )
    return Part(torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs]), alpha)


_NEWER_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def write_per_expert(
    adapter: AdapterFile, directory: Path, base: BaseModel, targets_in_newer_names: bool = False
) -> None:
    """Writes an adapter for readers that treat experts as linear layers.

    Args:
        adapter: an adapter of this package.
        directory: output directory; created if it does not exist.
        base: the adapter's base model.
        targets_in_newer_names: replace `w1`, `w3`, `w2` by `gate_proj`, `up_proj`, `down_proj` in `target_modules`,
            but not in the keys: SGLang 0.5.23 accepts the former only in keys (`sglang/srt/lora/utils.py`).

    Raises:
        ValueError: the adapter has tensors that these readers do not support (see `uniform`), or a layer whose weight
            is not a separate tensor in the checkpoint.
    """
    adapter, base = in_whole_model(uniform(adapter, base), base)
    tensors = {}
    for factors in adapter.experts:
        is_pair = factors.projection == "gate_up_proj"
        parts = gate_and_up(factors.B, base.layouts[factors.path]) if is_pair else [factors.B]
        for number, name in enumerate(base.names_of_experts(factors.path, factors.projection)):
            expert, part = divmod(number, len(parts))
            tensors[name + A_SUFFIX] = factors.A[expert]
            tensors[name + B_SUFFIX] = parts[part][expert]
    tensors |= linear_in_checkpoint(adapter, base)
    targets = {key.removesuffix(A_SUFFIX).rpartition(".")[2] for key in tensors if key.endswith(A_SUFFIX)}
    if targets_in_newer_names:
        targets = {_NEWER_NAMES.get(name, name) for name in targets}
    save_lora(directory, tensors, adapter, targets, base)
