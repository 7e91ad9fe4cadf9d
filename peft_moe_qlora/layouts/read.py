"""Reading a saved adapter of any layout, which is determined from the files in its directory."""

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
from tqdm.auto import tqdm

from ..config import MoeQLoraPeftType
from ..progress import PATIENCE
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

    Layouts: PEFT's LoRA on fused parameters of all versions, unsloth's before and after its change of order; LoRA on
    one linear layer per expert; 3-D factors (SGLang); mlx-lm.

    Args:
        directory: directory of the adapter.
        base: directory of the base model, whose config.json is read. Default: the base that the adapter names. An
            adapter of this package can be read without a base; then only its own consistency is checked.
        options: information that adapter files of other tools lack.
        usual_quant_type: default of `quant_type` in the options.

    Raises:
        ValueError: the directory contains no adapter, an unknown layout or several layouts, or an invalid adapter:
            truncated, without a tensor, a layer or an expert, with unexpected tensors, values that are not finite,
            shapes that do not fit, or invalid option values. The error names the file and the key. Or the layout of a
            tensor is ambiguous; the error names the option that specifies it.
    """
    directory, options = Path(directory), options or ReadOptions()
    config_file = directory / CONFIG_NAME
    config = read_config(directory)
    found_type = config.get("peft_type")
    is_own = found_type == MoeQLoraPeftType.MOE_QLORA.value
    is_mlx = _is_of_mlx(config)
    if found_type != "LORA" and not is_own and not is_mlx:
        raise ValueError(
            f"{directory} contains an adapter of type {found_type}. Expected {MoeQLoraPeftType.MOE_QLORA.value}, "
            "LORA, or an adapter of mlx-lm."
        )
    check = check_own_options if is_own else check_mlx_options if is_mlx else check_lora_options
    check(config_file, config)
    peft_config = peft_options(config, str(config_file)) if is_mlx else config
    file = weights_file(directory)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in _load_tensors(file).items()}
    named, revision = peft_config.get("base_model_name_or_path"), revision_of_base(peft_config, base)
    if is_own:
        _check_options_are_used(options, "of this package", "quant_type", "written_by", "lora_b_order", "partial")
        # the base that the adapter names may be on the hub only; a base from the caller must exist
        is_here = base is not None or BaseModel.is_at(named)
        return read_own(directory, tensors, BaseModel.open(base or named, tensors, revision) if is_here else None)
    found = BaseModel.open(base or named, tensors, revision)
    reading = replace(options, quant_type=options.quant_type or usual_quant_type)
    foreign = ForeignAdapter(file, peft_config, tensors, found, reading)
    reader = read_mlx if is_mlx else _reader(file, tensors, found)
    if reader is not read_peft_lora:
        layout = reader.__name__.removeprefix("read_").replace("_", "-")
        _check_options_are_used(options, f"in the {layout} layout", "written_by", "lora_b_order")
    return reader(foreign)


def read_config(directory: Path) -> dict[str, Any]:
    """The options of a saved adapter as JSON values.

    Raises:
        ValueError: there is no config file, or it is unreadable.
    """
    file = directory / CONFIG_NAME
    if not file.is_file():
        below = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}"))
        where = f" Pass one of its subdirectories that contain adapters: {', '.join(below)}." if below else ""
        raise ValueError(f"{directory} contains no {CONFIG_NAME}. Expected the directory of a saved adapter.{where}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}. Save the adapter again.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{file} contains a JSON value of type {type(config).__name__}. Expected an object with the options of an "
            "adapter."
        )
    return config


def weights_file(directory: Path) -> Path:
    """Path of a saved adapter's tensor file, which may not exist.

    Raises:
        ValueError: see `read_config`.
    """
    return directory / (FILE_NAME if _is_of_mlx(read_config(directory)) else SAFETENSORS_WEIGHTS_NAME)


def _is_of_mlx(config: dict[str, Any]) -> bool:
    return "fine_tune_type" in config and config.get("peft_type") is None


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Key -> tensor of an adapter's safetensors file.

    Raises:
        ValueError: the file is missing or truncated, or has tensors that are not floating point of 16, 32 or 64 bits
            or not finite. The error names file and key.
    """
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        found = (
            f"{pickled.name} is a pickle, which is not supported. Save the adapter as safetensors"
            if pickled.is_file()
            else "Expected the directory of a saved adapter"
        )
        raise ValueError(f"{file.parent} contains no {file.name}. {found}.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is unreadable: {error}. It is truncated or not a safetensors file. Download or save it again."
        ) from error
    # without PEFT's copy of a frozen head or embedding that is quantized
    tensors = {
        key: one
        for key, one in tensors.items()
        if one.is_floating_point() or ".base_layer." not in key or ".lora_" in key
    }
    for key, tensor in tqdm(tensors.items(), desc="Reading adapter", unit="tensor", delay=PATIENCE):
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{file}: {key} is stored as {str(tensor.dtype).removeprefix('torch.')}. Expected float16, bfloat16, "
                "float32 or float64. Save the adapter in one of these dtypes."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{file}: {key} contains values that are not finite. The adapter is damaged. Save the adapter again."
            )
    return tensors


def _check_options_are_used(options: ReadOptions, layout: str, *unused: str) -> None:
    """Rejects options that do not apply to a layout."""
    for name in unused:
        if getattr(options, name):
            raise ValueError(
                f"{name}={getattr(options, name)!r} does not apply to an adapter {layout}. Remove this option."
            )


def _reader(file: Path, tensors: dict[str, torch.Tensor], base: BaseModel) -> Callable[[ForeignAdapter], AdapterFile]:
    """Returns the function that reads a LoRA with keys of this kind."""
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
            f"{file} mixes tensors of several layouts: {', '.join(sorted(readers.values()))}. Expected one layout."
        )
    raise ValueError(
        f"{file} contains no factors of experts of {base.directory}. Pass the adapter's own base model as base "
        "(--base), or use PEFT's own LoRA for an adapter of linear layers only."
    )
