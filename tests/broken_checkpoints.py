"""Published checkpoints with one defect each, and the expected error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_writers import Tensors, write_tensors
from published_writers import GATE, QUERY

from peft_moe_qlora import CheckpointError, load_quantized
from peft_moe_qlora.loading import inspect_checkpoint


def load(directory: Path) -> torch.nn.Module:
    return load_quantized(directory, dtype=torch.float32, device_map="cpu")


def change(tensors: Tensors, key: str, do) -> None:
    tensor = tensors[key].clone()
    found = do(tensor)
    tensors[key] = tensor if found is None else found


def put(value, *index):
    def do(tensor: torch.Tensor) -> None:
        tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype)[index] = value

    return do


def write(directory: Path, config: dict, tensors: Tensors) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    write_tensors(directory, tensors)


def places(kinds: dict) -> dict[str, tuple]:
    """Each kind of defect in an expert, and in a linear layer if it is stored in the same way."""
    names = {"an expert": GATE, "a linear layer": QUERY}
    return {
        f"{kind}, in {place}": (*defect, name)
        for kind, defect in kinds.items()
        for place, name in names.items()
        if name == GATE or not defect[0].startswith("mxfp4")
    }


def refuses_headers(config: dict, tensors: Tensors, do: Callable, name: str, message: str, directory: Path) -> None:
    """Found before any tensor is read; `inspect` does not find it."""
    config, tensors = copy.deepcopy((config, tensors))
    do(tensors, name)
    write(directory, config, tensors)
    for read in (inspect_checkpoint, load):
        with pytest.raises(CheckpointError, match=message):
            read(directory)


def refuses_values(
    config: dict, tensors: Tensors, part: str, do: Callable, name: str, message: str, directory: Path
) -> None:
    config, tensors = copy.deepcopy((config, tensors))
    change(tensors, f"{name}.{part}", do)
    write(directory, config, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(directory)
    assert name in str(caught.value)
    assert "model.safetensors" in str(caught.value)
