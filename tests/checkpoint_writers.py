"""Checkpoints in the layouts of other tools, written with safetensors and bitsandbytes only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def read_tensors(directory: Path) -> Tensors:
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return tensors


def write_tensors(directory: Path, tensors: Tensors, num_shards: int = 1) -> None:
    """Replaces the weights of a saved model; several shards get an index."""
    for file in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        file.unlink()
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return
    keys, weight_map = sorted(tensors), {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        of_shard = keys[shard * len(keys) // num_shards : (shard + 1) * len(keys) // num_shards]
        save_file({key: tensors[key] for key in of_shard}, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(of_shard, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def packed(
    key: str,
    weight: torch.Tensor,
    quant_type: str = "nf4",
    nested: bool = False,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
) -> Tensors:
    """The tensors that bitsandbytes writes for a quantized weight."""
    codes, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    return {key: codes, **{f"{key}.{name}": part for name, part in state.as_dict(packed=True).items()}}


def pack(tensors: Tensors, is_packed: Callable[[str], bool], **options) -> Tensors:
    """Packs the tensors with the selected keys."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        found |= packed(key, tensor, **options) if is_packed(key) else {key: tensor}
    return found


def set_bitsandbytes_config(directory: Path, skip: list[str]) -> None:
    """Marks the checkpoint in config.json as packed by bitsandbytes, except for the named linear layers."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skip,
    }
    file.write_text(json.dumps(config))
