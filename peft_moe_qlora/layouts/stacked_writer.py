"""Adapters with one A and one B for each stack of experts: `PATH.gate_up_proj.lora_A.weight` `(E, r, in)`, `lora_B`
`(E, out, r)`, gate rows before up rows whichever way the class has them.

SGLang 0.5.23 reads it (`sglang/srt/lora/mem_pool.py`), and the converter of llama.cpp 0c1e57098 for Gemma 4.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .adapter_file import AdapterFile
from .base_model import BaseModel
from .gaps import exclude_pattern, find_gaps
from .non_expert import A_SUFFIX, B_SUFFIX, adapted_layers
from .uniform import adapted_blocks, gate_and_up, linear_in_checkpoint, save_lora, uniform


def write_stacked(adapter: AdapterFile, directory: Path, base: BaseModel) -> None:
    """Writes an adapter for readers of stacked factors.

    Args:
        adapter: one of this package.
        directory: created if it isn't there.
        base: the model that it belongs to, whose checkpoint has its stacks under the names of the modules.

    Raises:
        ValueError: the adapter has what these readers don't know (see `uniform`), or a layer that has no name of its
            own in the checkpoint.
    """
    adapter = uniform(adapter, base)
    tensors = {}
    for factors in adapter.experts:
        is_pair = factors.projection == "gate_up_proj"
        B = torch.cat(gate_and_up(factors.B, base.layouts[factors.path]), dim=1) if is_pair else factors.B
        tensors[factors.name + A_SUFFIX], tensors[factors.name + B_SUFFIX] = factors.A, B
    tensors |= linear_in_checkpoint(adapter, base)
    targets = {"gate_proj", "up_proj", "down_proj"}
    targets |= {name.rpartition(".")[2] for name in adapted_layers(adapter.others)}
    blocks = adapted_blocks(tensors, base)
    excluded = exclude_pattern(find_gaps(adapter, base, blocks), base)
    save_lora(directory, tensors, adapter.config, targets, blocks, excluded)
