"""The files of a saved adapter: its tensors, in safetensors or refused, and its README, which tells how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, file_exists, try_to_load_from_cache
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

_IMPORT = "import peft_moe_qlora"
_PLACE = "Use the code below to get started with the model.\n\n[More Information Needed]"
"""In the template that PEFT fills in (huggingface_hub's model card)."""

_REMEDY = (
    f"is a pickle, which is never read; {SAFETENSORS_WEIGHTS_NAME} was expected. Save the adapter again with "
    "save_pretrained(..., safe_serialization=True)."
)


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]] | None:
    """Key -> shape of the tensors of an adapter in a directory; None if there is none.

    Raises:
        ValueError: the tensors are pickled, or their file is cut off. The error names the file.
    """
    file, pickled = directory / SAFETENSORS_WEIGHTS_NAME, directory / WEIGHTS_NAME
    if not file.is_file():
        if pickled.is_file():
            raise ValueError(f"{pickled} {_REMEDY}")
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} can't be read: {error}. It is cut off or no safetensors file.") from error


def refuse_pickled_on_hub(name: str, subfolder: str | None, options: dict[str, Any]) -> None:
    """Refuses an adapter on the hub that PEFT would unpickle, for want of safetensors.

    Args:
        name: on the hub.
        subfolder: of the adapter in there.
        options: of `from_pretrained`; those of the hub count.

    Raises:
        ValueError: the tensors are pickled.
    """
    if not _is_on_hub(name, subfolder, SAFETENSORS_WEIGHTS_NAME, options) and _is_on_hub(
        name, subfolder, WEIGHTS_NAME, options
    ):
        raise ValueError(f"{WEIGHTS_NAME} of {name} on the hub {_REMEDY}")


def _is_on_hub(name: str, subfolder: str | None, file: str, options: dict[str, Any]) -> bool:
    """As PEFT asks: without a connection, whether the cache has it."""
    place = {key: options[key] for key in ("revision", "repo_type") if options.get(key) is not None}
    file = f"{subfolder}/{file}" if subfolder else file
    if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
        return isinstance(try_to_load_from_cache(name, file, options.get("cache_dir"), **place), str)
    return file_exists(name, file, token=options.get("token", options.get("use_auth_token")), **place)


def refuse_pickled_just_saved(directory: Path) -> None:
    """Refuses what `save_pretrained(..., safe_serialization=False)` has written, before its config is there.

    Raises:
        ValueError: the newest tensors in the directory are pickled.
    """
    file, pickled = directory / SAFETENSORS_WEIGHTS_NAME, directory / WEIGHTS_NAME
    if not pickled.is_file():
        return
    if not file.is_file() or file.stat().st_mtime_ns < pickled.stat().st_mtime_ns:
        raise ValueError(f"{pickled} {_REMEDY} Then remove {pickled.name}.")


def refuse_parts_just_saved(directory: Path) -> None:
    """Rejects the incomplete file that a process wrote of a model sharded by ZeRO-3, before its config is written.

    Raises:
        ValueError: a tensor in the directory is empty.
    """
    for name, shape in (stored_shapes(directory) or {}).items():
        if 0 in shape:
            raise ValueError(
                f"{directory / SAFETENSORS_WEIGHTS_NAME} has been written with an empty {name}, since DeepSpeed's "
                "ZeRO-3 has the rest of it in other processes. Save again, with is_main_process and state_dict."
            )


def add_loading(directory: str | Path, base: str | None, format_version: int) -> None:
    """Writes how the adapter is loaded into a directory's README.md, once.

    Args:
        directory: of the adapter.
        base: what it was trained on, as its config names it.
        format_version: of the adapter file.
    """
    file = Path(directory, "README.md")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if _IMPORT in text:
        return
    model = base or "a mixture-of-experts model"
    section = (
        f"An adapter of `peft-moe-qlora`, format version {format_version}, for {model}. "
        "One import makes it known to PEFT.\n\n"
        "```python\n"
        f"{_IMPORT}\n"
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("this directory, or its name on the hub")\n'
        "```"
    )
    if _PLACE in text:
        text = text.replace(_PLACE, section)
    else:
        text = f"{text.rstrip()}\n\n## Loading\n\n{section}\n".lstrip()
    file.write_text(text, encoding="utf-8")
