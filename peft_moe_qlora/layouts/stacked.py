"""One A and one B for each stack of experts, which is SGLang's internal layout.

Keys are `PATH.<part>.lora_A.weight` `(E, r, in)` and `.lora_B.weight` `(E, out, r)`, with or without `.weight`, where
the parts are gate_up_proj and down_proj, or gate_proj, up_proj and down_proj. The rows of gate_up_proj's B are the
gate's followed by the up projection's, regardless of the order in the model. Layout: `sglang.srt.lora.mem_pool`,
0.5.23; the converter of llama.cpp 0c1e57098 reads it for Gemma 4.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import rank_and_alpha
from .adapter_file import AdapterFile
from .base_model import BaseModel
from .foreign import ForeignAdapter
from .gate_up_halves import (
    Part,
    check_layers,
    containers_of,
    gate_and_up,
    join_parts,
    non_expert_by_own_names,
    part_names,
    with_rows_in_order,
)
from .non_expert import A_SUFFIX, B_SUFFIX, adapted_layers
from .uniform import linear_in_checkpoint, save_lora, uniform


def read_stacked(foreign: ForeignAdapter) -> AdapterFile:
    """Reads the layout.

    Raises:
        ValueError: a factor or a layer is missing, or a tensor fits no layer of the base.
    """
    left = {_with_weight(key): tensor for key, tensor in foreign.tensors.items()}
    found: dict[str, dict[str, Part]] = {}
    names_of: dict[str, dict[str, str]] = {}
    for path, layout in foreign.base.layouts.items():
        names = {name: part for part, names in part_names(layout).items() for name in names}
        names |= {"gate_up_proj": "gate_up"} if layout.has_gate else {}
        names_of[path] = {
            f"{container}.{name}": part
            for container in containers_of(foreign.base, path)
            for name, part in names.items()
        }
        parts = {}
        for name, part in names_of[path].items():
            pair = [left.pop(f"{name}.lora_{factor}.weight", None) for factor in "AB"]
            if pair == [None, None]:
                continue
            parts[part] = _part(foreign, name, *pair)
        if "gate_up" in parts and not layout.is_concatenated:
            whole = parts["gate_up"]
            parts["gate_up"] = Part(whole.A, with_rows_in_order(whole.B, layout), whole.alpha)
        if parts:
            found[path] = parts

    def is_targeted(path: str, part: str) -> bool:
        names = [name for name, one in names_of[path].items() if one == part]
        # experts are targeted by their parts' names, even if the file stores them fused
        return any(foreign.targets(name) for name in names) or (part == "gate_up" and is_targeted(path, "up"))

    check_layers(foreign, found, is_targeted)
    experts = [factors for path, parts in found.items() for factors in join_parts(foreign, path, parts)]
    non_expert, names = non_expert_by_own_names(foreign, left, foreign.targets)
    return foreign.adapter(experts, non_expert, lambda name: rank_and_alpha(foreign.config, names[name], name))


def _with_weight(key: str) -> str:
    return f"{key}.weight" if key.endswith((".lora_A", ".lora_B")) else key


def _part(foreign: ForeignAdapter, name: str, A: torch.Tensor | None, B: torch.Tensor | None) -> Part:
    if A is None or B is None:
        raise ValueError(
            f"{foreign.file} contains only one of the factors lora_A and lora_B of {name}. The file is damaged. Save "
            "the adapter again."
        )
    if A.dim() != 3 or B.dim() != 3 or A.shape[1] != B.shape[2]:
        raise ValueError(
            f"{foreign.file}: the factors of {name} have shapes {list(A.shape)} and {list(B.shape)}. Expected "
            "(E, r, in) and (E, out, r). The factors are transposed, or the file is damaged. Save the adapter again."
        )
    r, alpha = rank_and_alpha(foreign.config, name)
    foreign.check_rank(name, A.shape[1], r)
    return Part(A, B, alpha)


def write_stacked(adapter: AdapterFile, directory: Path, base: BaseModel) -> None:
    """Writes an adapter for readers of stacked factors.

    Args:
        adapter: an adapter of this package.
        directory: output directory; created if it does not exist.
        base: the adapter's base model, whose checkpoint stores the stacks under the names of the modules.

    Raises:
        ValueError: the adapter has tensors that these readers do not support (see `uniform`), or a layer whose weight
            is not a separate tensor in the checkpoint.
    """
    adapter = uniform(adapter, base)
    tensors = {}
    for factors in adapter.experts:
        is_pair = factors.projection == "gate_up_proj"
        B = torch.cat(gate_and_up(factors.B, base.layouts[factors.path]), dim=1) if is_pair else factors.B
        tensors[factors.name + A_SUFFIX], tensors[factors.name + B_SUFFIX] = factors.A, B
    tensors |= linear_in_checkpoint(adapter, base)
    targets = {"gate_proj", "up_proj", "down_proj"}
    targets |= {name.rpartition(".")[2] for name in adapted_layers(adapter.non_expert)}
    save_lora(directory, tensors, adapter, targets, base)
