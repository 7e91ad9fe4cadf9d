"""Adapters into the layouts of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .adapter_file import AdapterFile
from .native import write_native
from .peft_lora import write_peft_lora
from .per_expert import write_per_expert
from .reading import read_adapter
from .source import ReadOptions

TARGETS: dict[str, Callable[[AdapterFile, Path, str | Path | None], None]] = {
    "peft-lora": write_peft_lora,
    "per-expert": write_per_expert,
    "moe-qlora": write_native,
}
"""Name of a layout -> what writes it."""


def convert_adapter(
    adapter: str | Path,
    directory: str | Path,
    target: str,
    base: str | Path | None = None,
    options: ReadOptions | None = None,
) -> AdapterFile:
    """Writes a saved adapter in another layout.

    Args:
        adapter: directory of an adapter of this package, or of others (`read_adapter` lists the layouts).
        directory: to be written to; has to be empty or not there, since some readers take every file in it.
        target: `"peft-lora"`: PEFT's own LoRA on fused parameters, for stock PEFT and vLLM's classes with 3-D experts.
            `"per-expert"`: LoRA on one linear layer per expert, under the names of the base's checkpoint, for vLLM's
            other classes, SGLang and llama.cpp's converter. `"moe-qlora"`: an adapter of this package.
        base: directory of the base model, of which config.json is read. Default: what the adapter names.
        options: what the adapter files of others don't say.

    Returns:
        What was read.

    Raises:
        ValueError: see `read_adapter` and the targets; or the directory is not empty.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown; choose one of {tuple(TARGETS)}.")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"{directory} is not an empty directory; some readers would take what is in it for the adapter."
        )
    found = read_adapter(adapter, base, options)
    TARGETS[target](found, directory, base)
    return found
