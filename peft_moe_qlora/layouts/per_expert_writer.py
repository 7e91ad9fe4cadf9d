"""Adapters with one LoRA per expert and projection, as experts were linear layers before they were fused.

Keys are those of the base's checkpoint, with `lora_A.weight` and `lora_B.weight` in place of `weight`. Gate and up
projection have the same A.
"""

from __future__ import annotations

from pathlib import Path

from .adapter_file import AdapterFile
from .base_model import BaseModel
from .gaps import exclude_pattern, find_gaps
from .non_expert import A_SUFFIX, B_SUFFIX
from .uniform import adapted_blocks, gate_and_up, linear_in_checkpoint, save_lora, uniform
from .whole_model import in_whole_model

_NEWER_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def write_per_expert(
    adapter: AdapterFile, directory: Path, base: BaseModel, targets_in_newer_names: bool = False
) -> None:
    """Writes an adapter for readers that know experts as linear layers.

    Args:
        adapter: one of this package.
        directory: created if it isn't there.
        base: the model that it belongs to.
        targets_in_newer_names: call `w1`, `w3`, `w2` `gate_proj`, `up_proj`, `down_proj` in `target_modules`, not in
            the keys: SGLang 0.5.23 knows the first ones as keys only (`sglang/srt/lora/utils.py`).

    Raises:
        ValueError: the adapter has what these readers don't know (see `uniform`), or a layer that has no name of its
            own in the checkpoint.
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
    blocks = adapted_blocks(tensors, base)
    excluded = exclude_pattern(find_gaps(adapter, base, blocks), base)
    save_lora(directory, tensors, adapter.config, targets, blocks, excluded)
