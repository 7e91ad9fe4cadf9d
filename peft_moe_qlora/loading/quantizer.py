"""The transformers quantizer that loads, saves and dequantizes models with quantized experts."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..experts import SHARD_LATER, QuantizedExperts, refuse_unsupported
from ..quantization import Format, Stack, parse_format
from ..sharded import refuse_fsdp1, refuse_sharded
from ..targets import expert_layouts, is_router
from .checkpoint import Checkpoint, CheckpointError, stored_quantization
from .disk import quant_method
from .finder import SourceFinder, conversions_of, ignored_keys, without_stacks
from .linear import asked_for_dtype, keep_linear_as_stored
from .packed_linear import (
    PackedWeight,
    attach_packed_weights,
    attach_saved_linear,
    fill_packed_weights,
    linear_storage,
)
from .packed_sources import PackedSource, requantized
from .quantization_config import AS_STORED, QUANT_METHOD, MoeQuantizationConfig, refuse_unreadable
from .restoring import ExpertsQuantizer, Undone, transformers_models
from .sources import DenseSource, NativeSource, Source, Sources, each_source
from .streaming import attach_empty_experts, cast_as_planned, fill_experts, planned_dtypes


class _Loading(NamedTuple):
    """State kept while transformers loads the rest of the model."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    sources: Sources
    weights: list[PackedWeight]
    names: dict[str, Any]
    dtypes: dict[str, torch.dtype]


@register_quantizer(QUANT_METHOD)
class MoeQuantizer(ExpertsQuantizer):
    """Quantizes experts while they load, and leaves linear layers to bitsandbytes' quantizer.

    transformers loads everything except the experts. These are read afterwards, expert by expert, into stacks on the
    devices of its device map.

    Args:
        quantization_config: a `MoeQuantizationConfig`.
        pre_quantized: whether the config is from the checkpoint rather than an argument of `from_pretrained`.
    """

    requires_calibration = False
    has_loaded_experts = True

    def __init__(self, quantization_config: MoeQuantizationConfig, **kwargs: Any) -> None:
        # copied: callers may reuse a configuration, and loading packed experts sets its storage
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        if quantization_config.quantize_linear:
            self.inner = Bnb4BitHfQuantizer(quantization_config.linear_config(), pre_quantized=self.pre_quantized)
        self._loading: _Loading | None = None
        self.state_dict_to_save: dict[str, torch.Tensor] | None = None
        """State dict to save instead of the model's, set by `save_bitsandbytes`."""

    # before loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict):
            devices = {str(device) for device in device_map.values()}
            if "disk" in devices or ("cpu" in devices and len(devices) > 1):
                raise ValueError(
                    "device_map offloads modules to the CPU or the disk, which is not supported for quantized "
                    "experts. Put all modules on GPUs, or use device_map='cpu'."
                )
        if self.inner is not None:
            self.inner.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        return Bnb4BitHfQuantizer.update_device_map(self, device_map)

    def adjust_max_memory(self, max_memory: dict) -> dict:
        return max_memory if self.inner is None else self.inner.adjust_max_memory(max_memory)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise ValueError(
                "from_pretrained(state_dict=...) is not supported, because quantized experts are read from files. "
                "Pass the directory of a checkpoint."
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(f"distributed_config is not supported with a MoeQuantizationConfig; {SHARD_LATER}")
        refuse_unsupported(model)
        checkpoint = Checkpoint(checkpoint_files)
        # transformers doesn't check methods that it doesn't know
        refuse_unreadable(stored_quantization(checkpoint.directory), checkpoint.directory)
        finder = SourceFinder(model, checkpoint, self.quantization_config.flipped_stacks or ())
        if not finder.targets:
            raise ValueError(
                f"No routed experts found in {type(model).__name__}: no module declares the fused 3-D stacks of "
                "transformers' @use_experts_implementation. Load dense models with BitsAndBytesConfig."
            )
        sources = finder.find()
        directory = checkpoint.directory
        config = self.quantization_config
        refuse_unexplained(sources, config if self.pre_quantized else None, directory)
        if not self.pre_quantized:
            check_skipped(model, config.skip_modules)
        else:
            self._check_explained(finder, sources)
        if not self.pre_quantized and config.storage != AS_STORED:
            sources = requantized(sources, config.format)
        settle_storage(config, sources)
        is_packed = finder.packed_beside or any(not isinstance(one, DenseSource) for one in each_source(sources))
        if not self.pre_quantized and config.format is None and self.inner is None and not is_packed:
            raise ValueError(
                f"{directory} has no quantized weights, and storage={config.storage!r} with quantize_linear=False "
                "leaves nothing to quantize. Load it without a quantization_config."
            )
        routers = _routers(model)
        attach_empty_experts(model, sources, self._storage_of, checkpoint)
        weights = []
        if config.packed_linear != "4 bits":
            weights = attach_packed_weights(
                model, finder.packed_beside, config.packed_linear != "16 bits", config.skip_modules
            )
        if config.linear_storage is not None:
            attach_saved_linear(model, finder, parse_format(config.linear_storage))
        elif weights:
            found = linear_storage(weights)
            config.linear_storage = None if found is None else str(found)
        if self.inner is not None:
            self._prepare_linear(model, finder, routers, [weight.name for weight in weights], **kwargs)
        if config.packed_linear == "4 bits":
            weights = attach_packed_weights(model, finder.packed_beside, False)
        names, dtypes = dict.fromkeys(model.state_dict()), planned_dtypes(model) if self.pre_quantized else {}
        self._loading = _Loading(model, checkpoint, sources, weights, names, dtypes)
        return model

    def _check_explained(self, finder: SourceFinder, sources: Sources) -> None:
        """Rejects a checkpoint without quantized weights whose config declares a quantization.

        Raises:
            CheckpointError: the checkpoint has no quantized weights.
        """
        are_dense = all(isinstance(source, DenseSource) for source in each_source(sources))
        if not are_dense or finder.packed_names() or finder.packed_beside or self.quantization_config.linear_storage:
            return
        checkpoint = finder.checkpoint
        declared = stored_quantization(checkpoint.directory)
        method = QUANT_METHOD if declared is None else quant_method(declared)
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'} declares that the model is quantized by {method!r}, but none of "
            f"the {len(checkpoint.tensors)} tensors in {len(checkpoint.files)} file(s), such as "
            f"{checkpoint.files[0].name}, is a weight quantized by it. Remove the files of another checkpoint, or "
            "quantization_config from config.json."
        )

    def _storage_of(self, source: Source) -> Format | None:
        config = self.quantization_config
        if not isinstance(source, (NativeSource, PackedSource)) and (
            # weights that a quantized checkpoint has in 16 bits stay in 16 bits
            self.pre_quantized or not should_convert_module(source.target.path, config.skip_modules)
        ):
            return None
        return config.format

    def _prepare_linear(
        self,
        model: PreTrainedModel,
        finder: SourceFinder,
        routers: list[str],
        packed_weights: list[str],
        **kwargs: Any,
    ) -> None:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if self.pre_quantized:
            packed = finder.packed_names()
            skipped = [name for name in linear if f"{name}.weight" not in packed]
            if len(skipped) == len(linear):
                self.inner = None
                self.quantization_config.quantize_linear = self.quantization_config.format is None
                return
            skipped = [re.escape(name) for name in skipped]
        else:
            skipped = self.get_modules_to_not_convert(
                model, self.quantization_config.skip_modules, model._keep_in_fp32_modules, add_default_skips=True
            )
            # transformers 5.23 mistakes `weight` in the name of a layer for the packed weight
            skipped += map(re.escape, [*routers, *(name for name in linear if "weight" in name)])
            skipped += map(re.escape, asked_for_dtype(model))
            skipped += [re.escape(name.removesuffix(".weight")) for name in packed_weights]
        config = self.inner.quantization_config
        config.bnb_4bit_compute_dtype = self.quantization_config.compute_dtype or model.dtype
        config.bnb_4bit_quant_storage = finder.packed_dtype
        config.llm_int8_skip_modules = skipped
        self.inner._process_model_before_weight_loading(model, **kwargs)

    # while transformers loads

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self.inner is not None and self.inner.param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        if self.inner is None:
            return param.element_size()
        return self.inner.param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> Any:
        return self.inner.get_quantize_ops()

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        kept = without_stacks(weight_conversions)
        if self.inner is not None:
            kept += self.inner.get_weight_conversions()
        self._keep_transformers_silent(kept)
        return kept

    def _keep_transformers_silent(self, conversions: list[WeightTransform]) -> None:
        """Keeps transformers from reporting tensors that are read later as missing or unexpected.

        Raises:
            CheckpointError: the checkpoint has tensors like these that belong to no layer of the model.
        """
        model, checkpoint, sources, weights, names, _ = self._loading
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

        def name_of(key: str) -> str:
            return rename_source_key(key, renamings, converters, model.base_model_prefix, names)[0]

        def pattern_of(key: str) -> str:
            return _any_number(name_of(key))

        read, loaded, missing, of_layers = set(), set(), set(), set()
        for source in each_source(sources):
            if isinstance(source, NativeSource):
                loaded.update(pattern_of(key) for key in source.keys)
            else:
                read.update(pattern_of(key) for key in source.keys)
                missing.add(_any_number(source.target.name).removesuffix("$") + r"\.")
        own = {source.target.name for source in each_source(sources)}
        tied = {name for name, _, _ in quantized_stacks(model)} - own
        missing.update(_any_number(name).removesuffix("$") + r"\." for name in tied)
        known = {key for source in each_source(sources) for key in source.keys}
        for weight in weights:
            known.update(weight.packed.keys)
            of_layers.update(pattern_of(key) for key in weight.packed.keys)
            missing.update(map(_any_number, weight.tensor_names))
        ignored = ignored_keys(model)
        for key in checkpoint.tensors.keys() - known:
            name, is_ignored = name_of(key), any(pattern.search(key) for pattern in ignored)
            pattern = _any_number(name)
            is_of_experts, is_of_layer = pattern in read | loaded, pattern in of_layers and name not in names
            if (is_of_experts or is_of_layer) and not is_ignored:
                raise CheckpointError(
                    f"{checkpoint.tensors[key]} belongs to {'experts' if is_of_experts else 'a layer'} that the model "
                    "does not have. Checkpoint and config do not match; download both again."
                )
        model._keys_to_ignore_on_load_unexpected |= read | of_layers
        model._keys_to_ignore_on_load_missing |= missing

    # after loading

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _, checkpoint, sources, weights, _, dtypes = self._loading
        for name, _, stack in quantized_stacks(model):
            if any(parameter.is_meta for parameter in stack.parameters()):
                raise ValueError(
                    f"device_map offloads {name} to the CPU or the disk, which is not supported for quantized "
                    "experts. Allow more GPU memory (device_map, max_memory), or use device_map='cpu'."
                )
            stack.requires_grad_(False)
        fill_experts(model, sources, checkpoint)
        cast_as_planned(model, dtypes)
        fill_packed_weights(model, weights, checkpoint)
        for part in transformers_models(model):
            part.hf_quantizer = self  # submodels can be saved separately
        if self.inner is not None:
            self.inner._process_model_after_weight_loading(model)
            keep_linear_as_stored(model)
        # is_loaded_in_4bit keeps Trainer from using nn.DataParallel, which can't replicate packed weights
        is_packed = any(stack.storage is not None for _, _, stack in quantized_stacks(model))
        has_codes = any(weight.template is None for weight in weights) or self.quantization_config.linear_storage
        model.is_loaded_in_4bit = is_packed or self.inner is not None or bool(has_codes)
        self._loading = None
        return model

    # a loaded model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        refuse_fsdp1()  # a Trainer reads this property after it has set up accelerate
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        if self.state_dict_to_save is not None:
            return self.state_dict_to_save, {}
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves only the adapter, which it identifies by the names in the model
        _refuse_saving_adapters(model)
        refuse_sharded(model, "saving the whole model")
        for _, experts, _ in quantized_stacks(model):
            experts.check_complete()
        model.config.quantization_config = self.quantization_config  # a submodel has a separate config
        # `save_pretrained` would revert all conversions and split packed stacks into experts, so the others are
        # reverted here, and none are left for `save_pretrained`
        before = getattr(model, "_weight_conversions", None)
        if isinstance(before, Undone):
            before = before.before
        conversions = conversions_of(model) if before is None else before
        conversions = [entry for entry in without_stacks(conversions) if not _has_no_inverse(entry)]
        check_linear_can_be_saved(model, conversions)
        self.quantization_config.flipped_stacks = flipped_stacks(model) or None
        stacks = tuple(f"{name}." for name, _, _ in quantized_stacks(model))
        tensors = model.state_dict()
        for name, source in getattr(model, "all_tied_weights_keys", {}).items():
            # fully training one of two tied weights unties them
            if name in tensors and source in tensors and tensors[name].data_ptr() == tensors[source].data_ptr():
                del tensors[name]
        model._weight_conversions = conversions
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith(stacks)}
        others = revert_weight_conversion(model, others)
        model._weight_conversions = Undone(before)
        return {**others, **{name: tensor for name, tensor in tensors.items() if name.startswith(stacks)}}, {}


def check_skipped(model: nn.Module, skip_modules: Sequence[str] | None) -> None:
    """Rejects entries of `skip_modules` that match no module.

    Raises:
        ValueError: an entry matches no module, or is not a regular expression; the error names the first.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in skip_modules or ():
        try:
            is_found = pattern and not all(should_convert_module(name, [pattern]) for name in names)
        except re.error as error:
            raise ValueError(
                f"skip_modules contains {pattern!r}, which is not a regular expression: {error}. Correct or remove it."
            ) from error
        if not is_found:
            raise ValueError(
                f"skip_modules contains {pattern!r}, which matches no module of {type(model).__name__}. Correct or "
                "remove it."
            )


def refuse_unexplained(sources: Sources, saved: MoeQuantizationConfig | None, directory: str | Path) -> None:
    """Rejects experts quantized by this package in a checkpoint without its configuration.

    Args:
        sources: sources of the stacks.
        saved: configuration of this package in the checkpoint's config.json; None if there is none.
        directory: directory of the checkpoint, for errors.

    Raises:
        CheckpointError: the configuration is missing; the error names the first tensor.
    """
    for source in each_source(sources):
        if isinstance(source, NativeSource) and (saved is None or saved.format is None):
            raise CheckpointError(
                f"{directory} has {source.keys[0]}, which peft-moe-qlora has quantized, but no config.json with its "
                "storage. Copy config.json from the original, or save the model again with save_pretrained."
            )


def settle_storage(config: MoeQuantizationConfig, sources: Sources) -> None:
    """Copies the storage format of experts packed by other tools to a configuration.

    Raises:
        CheckpointError: the experts have different formats.
    """
    packed = [source for source in each_source(sources) if isinstance(source, PackedSource)]
    for source in packed:
        if source.storage != packed[0].storage:
            raise CheckpointError(
                f"{source.target.name} is stored as {source.storage} and {packed[0].target.name} as "
                f"{packed[0].storage}. Expected one storage for all packed experts. Use the 16-bit checkpoint."
            )
    if packed:
        config.set_format(packed[0].storage)


def quantized_stacks(model: nn.Module) -> Iterator[tuple[str, QuantizedExperts, Stack]]:
    """Name, experts module and stack of all stacks in a model's `QuantizedExperts`."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            yield from ((f"{path}.{name}", module, module.stack(name)) for name in module.layout.projections)


def flipped_stacks(model: nn.Module) -> list[str]:
    """Names of the stacks stored in the opposite orientation to their class."""
    return [
        name for name, experts, stack in quantized_stacks(model) if stack.is_transposed != experts.layout.is_transposed
    ]


def check_linear_can_be_saved(model: nn.Module, conversions: list[WeightTransform]) -> None:
    """Rejects packed linear layers that have another shape in the layout of the checkpoint.

    Raises:
        ValueError: there is such a layer; the error names the first.
    """
    made = {
        target: entry
        for entry in conversions
        if isinstance(entry, WeightConverter)
        for target in entry.target_patterns
    }
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        for target, entry in made.items():
            if target in f"{name}.weight":
                raise ValueError(
                    f"{name} is in 4 bits, but its layout in checkpoints of {type(model).__name__} requires "
                    f"{', '.join(type(op).__name__ for op in entry.operations)}, which is not supported for packed "
                    "weights. Load with quantize_linear=False or the layer in skip_modules, or call dequantize() "
                    "first."
                )


def _refuse_saving_adapters(model: PreTrainedModel) -> None:
    """Rejects saving a full model with adapters: no loader would read the adapters' tensors from its checkpoint.

    Raises:
        ValueError: the model has adapters.
    """
    if any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} contains adapters, and saving a full model with adapters is not supported. Save "
            "the adapters with save_pretrained of the PeftModel, or call its merge_and_unload() or unload() first."
        )


def _routers(model: nn.Module) -> list[str]:
    layouts = expert_layouts(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_router(name, module, layouts)
    ]


def _any_number(name: str) -> str:
    """A pattern for a name in which all numbers, such as layers and experts, match any number."""
    return "^" + re.sub(r"\d+", r"\\d+", re.escape(name)) + "$"


def _has_no_inverse(conversion: WeightTransform) -> bool:
    """Whether transformers can't revert a conversion: bitsandbytes' own, up to transformers 5.23."""
    return isinstance(conversion, WeightConverter) and any(
        type(operation).__name__ == "Bnb4bitDeserialize" for operation in conversion.operations
    )
