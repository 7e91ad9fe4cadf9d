"""Adapters of this package: `README.md` describes the file."""

from __future__ import annotations

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from .adapter_file import PREFIX, AdapterFile
from .base_model import BaseModel


def write_native(adapter: AdapterFile, directory: Path, base: BaseModel | None) -> None:
    """Writes an adapter that `PeftModel.from_pretrained` loads once this package is imported.

    Args:
        adapter: what was read.
        directory: created if it isn't there.
        base: not needed; writers are called alike.
    """
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in adapter.others.items()}
    for factors in adapter.experts:
        for factor, tensor in (("A", factors.A), ("B", factors.B)):
            tensors[f"{PREFIX}{factors.name}.lora_{factor}.weight"] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    # cloned, since a safetensors file has every number once and A may be a view
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in tensors.items()},
        directory / SAFETENSORS_WEIGHTS_NAME,
        {"format": "pt"},
    )
    adapter.config.save_pretrained(str(directory))
