"""Reading a saved adapter, whatever its layout: what is in the directory decides, never a guess."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..config import MoeQLoraPeftType
from .adapter_file import PREFIX, AdapterFile
from .base_model import BaseModel, revision_of_base
from .foreign import ForeignAdapter, ReadOptions, check_lora_options
from .gate_up_halves import names_of_parts
from .mlx import FILE_NAME, check_mlx_options, peft_options, read_mlx
from .native import check_own_options, read_own
from .non_expert import A_SUFFIX
from .peft_lora import read_peft_lora
from .per_expert import read_per_expert
from .stacked import read_stacked

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_adapter(
    directory: str | Path,
    base: str | Path | None = None,
    options: ReadOptions | None = None,
    usual_quant_type: str = "nf4",
) -> AdapterFile:
    """Reads an adapter of this package, or of another tool if it has factors of experts.

    Layouts: PEFT's LoRA on fused parameters of every version, unsloth's before and after its change of order; LoRA on
    one linear layer per expert; 3-D factors (SGLang); mlx-lm.

    Args:
        directory: of the adapter.
        base: directory of the base model, of which config.json is read. Default: what the adapter names. One of this
            package is read without a base too, and then held against itself only.
        options: what the files of others don't say.
        usual_quant_type: what counts where the options have no `quant_type`.

    Raises:
        ValueError: the directory holds no adapter, one of an unknown layout or of several, or a bad one: cut off,
            lacking a tensor, a layer or an expert, with tensors that nothing wants, values that are not finite,
            shapes that don't fit, or options that have no such value. The error names the file and the key. Or nothing
            decides how a tensor is to be read; the error names the option that does.
    """
    directory, options = Path(directory), options or ReadOptions()
    config_file = directory / CONFIG_NAME
    config = read_config(directory)
    found_type = config.get("peft_type")
    is_own = found_type == MoeQLoraPeftType.MOE_QLORA.value
    is_mlx = _is_of_mlx(config)
    if found_type != "LORA" and not is_own and not is_mlx:
        raise ValueError(
            f"{directory} holds an adapter of type {found_type}; {MoeQLoraPeftType.MOE_QLORA.value}, LORA, or one of "
            "mlx-lm was expected."
        )
    check = check_own_options if is_own else check_mlx_options if is_mlx else check_lora_options
    check(config_file, config)
    peft_config = peft_options(config, str(config_file)) if is_mlx else config
    file = weights_file(directory)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in _load_tensors(file).items()}
    named, revision = peft_config.get("base_model_name_or_path"), revision_of_base(peft_config, base)
    if is_own:
        _check_options_are_used(options, "this package's own", "quant_type", "written_by", "lora_b_order", "partial")
        # what the adapter names may be on the hub; what the caller names has to be there
        is_here = base is not None or BaseModel.is_at(named)
        return read_own(directory, tensors, BaseModel.open(base or named, tensors, revision) if is_here else None)
    found = BaseModel.open(base or named, tensors, revision)
    reading = replace(options, quant_type=options.quant_type or usual_quant_type)
    foreign = ForeignAdapter(file, peft_config, tensors, found, reading)
    reader = read_mlx if is_mlx else _reader(file, tensors, found)
    if reader is not read_peft_lora:
        _check_options_are_used(options, f"read by {reader.__name__}", "written_by", "lora_b_order")
    return reader(foreign)


def read_config(directory: Path) -> dict[str, Any]:
    """The options of a saved adapter, as JSON has them.

    Raises:
        ValueError: there is none, or it can't be read.
    """
    file = directory / CONFIG_NAME
    if not file.is_file():
        below = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}"))
        where = f"; there are some in its folders {', '.join(below)}, of which one is to be named" if below else ""
        raise ValueError(f"{directory} has no {CONFIG_NAME}; a saved adapter was expected{where}.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} can't be read: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}; the options of an adapter were expected.")
    return config


def weights_file(directory: Path) -> Path:
    """Where a saved adapter has its tensors, whether or not the file is there.

    Raises:
        ValueError: see `read_config`.
    """
    return directory / (FILE_NAME if _is_of_mlx(read_config(directory)) else SAFETENSORS_WEIGHTS_NAME)


def _is_of_mlx(config: dict[str, Any]) -> bool:
    return "fine_tune_type" in config and config.get("peft_type") is None


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Key -> tensor of an adapter's safetensors.

    Raises:
        ValueError: the file is not there, is cut off, or has tensors that are not of 16, 32 or 64 bits floating point
            or values that are not finite. The error names file and key.
    """
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        found = f"{pickled.name} is a pickle, which is never read" if pickled.is_file() else "a saved adapter has it"
        raise ValueError(f"{file.parent} has no {file.name}; {found}.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} can't be read: {error}. It is cut off or no safetensors file.") from error
    # without PEFT's copy of a frozen head or embedding that is quantized
    tensors = {
        key: one
        for key, one in tensors.items()
        if one.is_floating_point() or ".base_layer." not in key or ".lora_" in key
    }
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{file}: {key} is stored as {str(tensor.dtype).removeprefix('torch.')}; 16, 32 or 64 bits floating "
                "point were expected. Save the adapter in one of these."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {key} has values that are not finite; the adapter is broken.")
    return tensors


def _check_options_are_used(options: ReadOptions, layout: str, *unused: str) -> None:
    """Refuses options that say nothing of a layout."""
    for name in unused:
        if getattr(options, name):
            raise ValueError(
                f"{name}={getattr(options, name)!r} says nothing of an adapter that is {layout}. Drop it."
            )


def _reader(file: Path, tensors: dict[str, torch.Tensor], base: BaseModel) -> Callable[[ForeignAdapter], AdapterFile]:
    """What reads a LoRA of that kind of keys."""
    of_experts = {name for path in base.layouts for name in names_of_parts(base, path)}
    readers: dict[Any, str] = {}
    for key, tensor in tensors.items():
        name = key.partition(".lora_")[0]
        if name in of_experts:
            readers[read_per_expert] = key
        elif ".lora_" in key and tensor.dim() == 3:
            readers[read_stacked] = key
        elif name.replace(".base_layer", "") in base.layouts and key.endswith(A_SUFFIX):
            readers[read_peft_lora] = key
    if len(readers) == 1:
        return next(iter(readers))
    if readers:
        raise ValueError(
            f"{file} has several layouts at once: {', '.join(sorted(readers.values()))}. One was expected."
        )
    raise ValueError(
        f"{file} has no factors of experts that {base.directory} has; PEFT's own LoRA does for an adapter of linear "
        "layers."
    )
