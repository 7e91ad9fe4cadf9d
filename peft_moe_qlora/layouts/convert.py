"""Converts saved adapters from one layout into another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .adapter_file import AdapterFile
from .base_model import BaseModel, revision_of_base
from .engines import LLAMA_CPP, MLX, SGLANG, VLLM, write_for_engine
from .foreign import ReadOptions
from .native import write_native
from .peft_lora import write_peft_lora
from .per_expert import write_per_expert
from .read import read_adapter

TARGETS: dict[str, Callable[[AdapterFile, Path, BaseModel | None], None]] = {
    "peft-lora": write_peft_lora,
    "per-expert": write_per_expert,
    "moe-qlora": write_native,
    "vllm": partial(write_for_engine, VLLM),
    "sglang": partial(write_for_engine, SGLANG),
    "llama.cpp": partial(write_for_engine, LLAMA_CPP),
    "mlx": partial(write_for_engine, MLX),
}
"""Name of a layout or of an engine -> function that writes it."""


def convert_adapter(
    adapter: str | Path,
    directory: str | Path,
    target: str,
    base: str | Path | None = None,
    options: ReadOptions | None = None,
) -> AdapterFile:
    """Writes a saved adapter in another layout.

    Args:
        adapter: directory of an adapter of this package or of another tool (`read_adapter` lists the layouts).
        directory: output directory. Must be empty or not exist, because some readers load every file in it.
        target: a layout or an engine. `"peft-lora"`: PEFT's own LoRA on fused parameters, for stock PEFT, with all
            factors unchanged. `"per-expert"`: LoRA on one linear layer per expert, under the names of the base's
            checkpoint. `"vllm"`, `"sglang"`, `"llama.cpp"` (its `convert_lora_to_gguf.py`), `"mlx"` (mlx-lm): the
            layout that the engine reads for this base; see `engines` for versions. `"moe-qlora"`: an adapter of this
            package.
        base: directory of the base model, whose config.json is read. Default: the base that the adapter names.
        options: information that adapter files of other tools lack.

    Returns:
        The adapter that was read.

    Raises:
        ValueError: see `read_adapter` and the targets; the directory is not empty; the base's config.json is required
            and does not exist; or the adapter does not fit the base, or lacks a stack that its config targets.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown. Choose one of {tuple(TARGETS)}.")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"{directory} is not an empty directory. Some readers load every file in it as part of the adapter. Use a "
            "new or empty directory."
        )
    if options is not None and options.quant_type is not None and target != "moe-qlora":
        raise ValueError(
            f"quant_type={options.quant_type!r} (--quant-type) does not apply to {target}, which stores only the "
            "factors. Remove this option."
        )
    found = read_adapter(adapter, base, options)
    named = found.config.base_model_name_or_path
    # two layouts rarely depend on the base, which may be a name on the hub
    is_needed = base is not None or target not in ("peft-lora", "moe-qlora") or BaseModel.is_at(named)
    revision = revision_of_base(vars(found.config), base)
    TARGETS[target](found, directory, BaseModel.open(base or named, found.stacks, revision) if is_needed else None)
    return found
