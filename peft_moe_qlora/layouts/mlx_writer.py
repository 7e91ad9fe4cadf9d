"""Adapters as mlx-lm 0.32.2 saves its own (`mlx_lm/tuner/utils.py`, `lora.py`).

`adapters.safetensors` has `lora_a` and `lora_b` of each layer: `(in, r)` and `(r, out)` of a linear one, `(E, r, in)`
and `(E, out, r)` of experts, gate and up apart. `adapter_config.json` has the scaling itself, one rank, and names of
layers within a block.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from .adapter_file import AdapterFile
from .base_model import PARTS_OF_FUSED, BaseModel
from .gaps import find_gaps, without_gaps
from .non_expert import adapted_layers
from .uniform import adapted_blocks, gate_and_up, pairs_in_checkpoint, uniform

_BLOCK = re.compile(r"(^|.*\.)layers\.\d+\.")


def write_mlx(
    adapter: AdapterFile, directory: Path, base: BaseModel, experts_name: str, prefixes: tuple[str, str] = ("", "")
) -> None:
    """Writes an adapter for `mlx_lm.load(..., adapter_path=directory)`.

    Args:
        adapter: one of this package.
        directory: created if it isn't there.
        base: the model that it belongs to.
        experts_name: what mlx-lm's class of the model calls the module that the checkpoint calls `experts`.
        prefixes: with what names start in the checkpoint, and with what there instead.

    Raises:
        ValueError: the adapter has what mlx-lm doesn't know (see `uniform`), or a layer that has no name of its own in
            the checkpoint.
    """
    adapter = uniform(adapter, base)
    names = [*adapted_layers(adapter.others), *(factors.path for factors in adapter.experts)]
    first = min(adapted_blocks(names, base) or [0])
    num_layers = base.model.config.get_text_config().num_hidden_layers
    adapter = without_gaps(adapter, find_gaps(adapter, base, list(range(first, num_layers))), base)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, A: torch.Tensor, B: torch.Tensor) -> None:
        if not name.startswith(prefixes[0]):
            raise ValueError(
                f"What mlx-lm calls {name} isn't known. Merge the adapter instead, or leave the layer out."
            )
        name = prefixes[1] + name.removeprefix(prefixes[0])
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A.contiguous().clone(), B.contiguous().clone()

    for factors in adapter.experts:
        of_first = base.names_of_experts(factors.path, factors.projection)[0]
        block = of_first.removesuffix(re.search(r"experts\.0\.\w+$", of_first)[0])
        if factors.projection == "gate_up_proj":
            for part, B in zip(PARTS_OF_FUSED, gate_and_up(factors.B, base.layouts[factors.path])):
                add(f"{block}{experts_name}.{part}", factors.A, B)
        else:
            add(f"{block}{experts_name}.{factors.projection}", factors.A, factors.B)
    for pair in pairs_in_checkpoint(adapter, base):
        add(pair.name, pair.A.T, pair.B.T)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapters.safetensors", {"format": "mlx"})
    config = {
        "fine_tune_type": "lora",
        "num_layers": num_layers - first,  # counted from the end
        "lora_parameters": {
            "rank": adapter.config.r,
            "scale": adapter.config.lora_alpha / adapter.config.r,
            "dropout": 0.0,
            "keys": sorted({_BLOCK.sub("", key).rpartition(".")[0] for key in tensors}),
        },
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
