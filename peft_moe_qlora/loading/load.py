"""Loads quantized models: from any supported checkpoint, or into a model created on the meta device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts import refuse_unsupported
from ..quantization import Format, FourBitFormat, QuantizedStack
from .checkpoint import Checkpoint, CheckpointError, read_weight_map, stored_quantization
from .disk import quant_method
from .finder import SourceFinder
from .in_memory import register_storage
from .linear import keep_linear_as_stored
from .paths import refuse_missing
from .quantization_config import QUANT_METHOD, MoeQuantizationConfig, refuse_unreadable
from .quantizer import check_skipped, refuse_unexplained, settle_storage
from .sources import DenseSource, NativeSource, Source
from .streaming import attach_empty_experts, fill_experts

_OF_HUB = (
    "revision",
    "cache_dir",
    "token",
    "subfolder",
    "local_files_only",
    "force_download",
    "proxies",
    "trust_remote_code",
)


def load_quantized(
    model_id: str,
    quantization_config: MoeQuantizationConfig | None = None,
    model_class: type | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a MoE model with quantized experts, from a 16-bit checkpoint or one that is already quantized.

    A checkpoint quantized by another tool keeps its codes, scales and 16-bit layers; one that was saved with a
    `MoeQuantizationConfig` is loaded as saved; any other is quantized while it loads.

    Args:
        model_id: a directory, or a name on the hub.
        quantization_config: configuration for an unquantized checkpoint, by default `MoeQuantizationConfig()`. For a
            checkpoint quantized by a tool other than bitsandbytes, experts in another storage are requantized to this.
        model_class: class whose `from_pretrained` is called. Default: the class named in the checkpoint's config.
        kwargs: arguments of `from_pretrained`; without `config`, also values of the model's config. `dtype`, or
            `torch_dtype` as it was named before, is `torch.bfloat16` by default.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: `quantization_config` has another type, or is given for a checkpoint already quantized by
            bitsandbytes or this package; or see `refuse_missing` and `check_skipped`.
        CheckpointError: see `readable_quantization`, `read_weight_map`, `Checkpoint` and `SourceFinder`.
    """
    if not isinstance(quantization_config, (MoeQuantizationConfig, type(None))):
        raise ValueError(
            f"quantization_config is a {type(quantization_config).__name__}. Expected a MoeQuantizationConfig; other "
            "configurations do not quantize experts."
        )
    config, dtype = kwargs.pop("config", None), kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", None) or dtype or torch.bfloat16
    of_hub = {name: kwargs[name] for name in _OF_HUB if name in kwargs}
    directory = Path(model_id, of_hub.get("subfolder") or "")
    if directory.is_dir():
        stored_quantization(directory)
        read_weight_map(directory, kwargs.get("variant"))  # transformers would open any path in an index
    else:
        refuse_missing(model_id)
    if config is None:
        config, kwargs = AutoConfig.from_pretrained(model_id, return_unused_kwargs=True, **kwargs)
        kwargs |= of_hub
    else:
        config = copy.deepcopy(config)
    _declare_stored(config, directory)
    found = readable_quantization(config, model_id)
    if found is not None and quantization_config is not None:
        if quant_method(found) in ("bitsandbytes", QUANT_METHOD):
            raise ValueError(
                f"{model_id} is already quantized ({quant_method(found)}), and its experts are loaded unchanged. "
                "Remove the argument quantization_config."
            )
        _set_quantization(config, None)
    elif found is None:
        quantization_config = quantization_config or MoeQuantizationConfig()
    elif quant_method(found) != QUANT_METHOD:
        _set_quantization(config, MoeQuantizationConfig.from_checkpoint(found).to_dict())
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    model_class = model_class or class_of(config)
    return model_class.from_pretrained(model_id, config=config, dtype=dtype, **kwargs)


def readable_quantization(config: PreTrainedConfig, place: str | Path) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint, None for an unquantized one.

    Args:
        config: config of the model.
        place: directory or name of the checkpoint, for errors.

    Raises:
        CheckpointError: the storage of the experts is not supported.
    """
    found = quantization_of(config)
    refuse_unreadable(found, place)
    return found


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The `quantization_config` of a model's config, or of its text model's; None if there is none."""
    for part in (config, config.get_text_config(decoder=True)):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return found.to_dict() if isinstance(found, QuantizationConfigMixin) else found
    return None


def _declare_stored(config: PreTrainedConfig, directory: Path) -> None:
    """Adds a quantization declared in a separate file to the config of a model."""
    if quantization_of(config) is None and (found := stored_quantization(directory)) is not None:
        _set_quantization(config, found)


def _set_quantization(config: PreTrainedConfig, found: dict[str, Any] | None) -> None:
    """Sets the `quantization_config` of a model's config, None for none, and removes that of its text config."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    if found is not None:
        config.quantization_config = found


def read_config(directory: str | Path) -> PreTrainedConfig:
    """Reads the config of a checkpoint.

    Raises:
        CheckpointError: config.json is not JSON, or its `quantization_config` is not an object.
        OSError: there is no config.json.
    """
    stored_quantization(Path(directory))
    config = AutoConfig.from_pretrained(directory)
    _declare_stored(config, Path(directory))
    return config


def saved_config(directory: Path) -> MoeQuantizationConfig | None:
    """The configuration of a checkpoint saved by this package; None for any other checkpoint.

    Raises:
        CheckpointError: config.json is invalid, or the storage of the experts is not supported.
    """
    found = stored_quantization(directory)
    refuse_unreadable(found, directory)
    if found is None or quant_method(found) != QUANT_METHOD:
        return None
    try:
        return MoeQuantizationConfig.from_dict(found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'}: quantization_config: {error}") from error


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class named in a checkpoint's config.

    Raises:
        ValueError: transformers has no such class.
    """
    for name in config.architectures or ():
        model_class = getattr(transformers, str(name), None)
        if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
            return model_class
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM._model_mapping[type(config)]
    raise ValueError(
        f"transformers {transformers.__version__} has none of the classes in the config: {config.architectures}. "
        "Upgrade transformers, or pass model_class."
    )


def load_experts(
    model: PreTrainedModel,
    directory: str | Path,
    storage: Format | None = FourBitFormat(),  # noqa: B008 - frozen
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    skip_modules: list[str] | None = None,
    progressbar: bool = True,
) -> None:
    """Loads and quantizes the experts of a model on the meta device from a checkpoint; other layers stay unchanged.

    For code that creates models without `from_pretrained`: `accelerate.load_checkpoint_and_dispatch` can load the
    other layers, but not fused experts.

    Args:
        model: model created under `torch.device("meta")`; its experts modules are replaced by `QuantizedExperts`.
        directory: directory of a safetensors checkpoint.
        storage: storage format for experts in floating point; None for `dtype`. Experts that are quantized in the
            checkpoint keep their storage.
        device: device of the stacks.
        dtype: dtype to which experts are cast before quantization. Default: the dtype of the model's parameters.
        skip_modules: experts modules to leave in `dtype`: paths, ends of paths or regular expressions.
        progressbar: whether to show a progress bar.

    Raises:
        CheckpointError: see `saved_config`, `Checkpoint` and `SourceFinder`; the model is then unchanged. Or a weight
            is not finite; the model is then unusable.
        ValueError: an experts class is not supported, or see `keep_linear_as_stored`, `check_skipped` and
            `attach_empty_experts`; the model is then unchanged.
    """
    refuse_unsupported(model)
    check_skipped(model, skip_modules)
    keep_linear_as_stored(model)
    saved = saved_config(Path(directory))
    checkpoint = Checkpoint.open(directory)
    finder = SourceFinder(model, checkpoint, (saved and saved.flipped_stacks) or ())
    sources = finder.find()
    refuse_unexplained(sources, saved, directory)
    settle_storage(MoeQuantizationConfig(), sources)

    def storage_of(source: Source) -> Format | None:
        if isinstance(source, NativeSource):
            return saved.format
        skipped = isinstance(source, DenseSource) and not should_convert_module(source.target.path, skip_modules)
        return None if skipped else storage

    attach_empty_experts(model, sources, storage_of, checkpoint, dtype)
    for path, of_module in sources.items():
        for projection, source in of_module.items():
            stack = model.get_submodule(path).stack(projection)
            stack.to_empty(device=device)
            if isinstance(source, NativeSource):
                source.copy_into(stack, checkpoint)
    fill_experts(model, sources, checkpoint, progressbar)
    for name, key in finder.beside_stacks.items():
        module_path, _, parameter_name = name.rpartition(".")
        # copied, because tensors on the CPU are memory-mapped and would change with the file
        value = checkpoint.read(key).to(device, dtype or model.get_parameter(name).dtype, copy=True)
        setattr(model.get_submodule(module_path), parameter_name, nn.Parameter(value, requires_grad=False))
    packed = [module for module in model.modules() if isinstance(module, QuantizedStack)]
    register_storage(model, packed[0].storage if packed else None)
