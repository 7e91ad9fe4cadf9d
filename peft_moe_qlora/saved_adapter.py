"""The files of a saved adapter: its tensors, which must be in safetensors, and a README with loading instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, file_exists, try_to_load_from_cache
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

_IMPORT = "import peft_moe_qlora"
_PLACE = "Use the code below to get started with the model.\n\n[More Information Needed]"
"""Placeholder in the model card template of huggingface_hub, which PEFT fills in."""

_REMEDY = (
    f"is a pickle, which is never read. Expected {SAFETENSORS_WEIGHTS_NAME}. Save the adapter again with "
    "save_pretrained(..., safe_serialization=True)."
)


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]] | None:
    """Key -> shape of the tensors of an adapter in a directory; None if there is none.

    Raises:
        ValueError: the file is a pickle or cannot be read; the error names it.
    """
    file, pickled = directory / SAFETENSORS_WEIGHTS_NAME, directory / WEIGHTS_NAME
    if not file.is_file():
        if pickled.is_file():
            raise ValueError(f"{pickled} {_REMEDY}")
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = tensors.keys()  # a handle can't be iterated
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}
    except SafetensorError as error:
        raise ValueError(
            f"{file} cannot be read: {error}. It is truncated or not a safetensors file. Copy or save the adapter "
            "again."
        ) from error


def refuse_pickled_on_hub(name: str, subfolder: str | None, options: dict[str, Any]) -> None:
    """Rejects an adapter on the hub that has no safetensors file, which PEFT would unpickle.

    Args:
        name: name of the repository on the hub.
        subfolder: folder of the adapter in the repository.
        options: keyword arguments of `from_pretrained`; only those of the hub are used.

    Raises:
        ValueError: the adapter file is a pickle.
    """
    if not _is_on_hub(name, subfolder, SAFETENSORS_WEIGHTS_NAME, options) and _is_on_hub(
        name, subfolder, WEIGHTS_NAME, options
    ):
        raise ValueError(f"{WEIGHTS_NAME} of {name} on the hub {_REMEDY}")


def _is_on_hub(name: str, subfolder: str | None, file: str, options: dict[str, Any]) -> bool:
    """Whether the hub has a file, checked as in PEFT: offline, whether the cache has it."""
    place = {key: options[key] for key in ("revision", "repo_type") if options.get(key) is not None}
    file = f"{subfolder}/{file}" if subfolder else file
    if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
        return isinstance(try_to_load_from_cache(name, file, options.get("cache_dir"), **place), str)
    return file_exists(name, file, token=options.get("token", options.get("use_auth_token")), **place)


def refuse_pickled_just_saved(directory: Path) -> None:
    """Rejects a pickle written by `save_pretrained(..., safe_serialization=False)`, before its config is written.

    Raises:
        ValueError: the newest adapter file in the directory is a pickle.
    """
    file, pickled = directory / SAFETENSORS_WEIGHTS_NAME, directory / WEIGHTS_NAME
    if not pickled.is_file():
        return
    if not file.is_file() or file.stat().st_mtime_ns < pickled.stat().st_mtime_ns:
        raise ValueError(f"{pickled} {_REMEDY} Then remove {pickled.name}.")


def refuse_parts_just_saved(directory: Path) -> None:
    """Rejects an incomplete file written by one process of a model sharded by ZeRO-3, before its config is written.

    Raises:
        ValueError: a tensor in the directory is empty.
    """
    for name, shape in (stored_shapes(directory) or {}).items():
        if 0 in shape:
            raise ValueError(
                f"{directory / SAFETENSORS_WEIGHTS_NAME} was written with an empty tensor {name}: DeepSpeed ZeRO-3 "
                "shards it over processes. Gather the state dict, and save again with the arguments state_dict and "
                "is_main_process of save_pretrained."
            )


def add_loading(directory: str | Path, base: str | None, format_version: int) -> None:
    """Adds loading instructions to the README.md of an adapter, unless it already has them.

    Args:
        directory: directory of the adapter.
        base: name of the base model in the adapter's config.
        format_version: version of the adapter file.
    """
    file = Path(directory, "README.md")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if _IMPORT in text:
        return
    model = base or "a mixture-of-experts model"
    section = (
        f"A `peft-moe-qlora` adapter, format version {format_version}, for {model}. "
        "Install `peft-moe-qlora`, and import it before you load the adapter:\n\n"
        "```python\n"
        f"{_IMPORT}\n"
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("path of this directory, or name on the hub")\n'
        "```"
    )
    if _PLACE in text:
        text = text.replace(_PLACE, section)
    else:
        text = f"{text.rstrip()}\n\n## Loading\n\n{section}\n".lstrip()
    file.write_text(text, encoding="utf-8")
