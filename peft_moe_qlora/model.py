"""The tuner: PEFT's LoRA on linear layers and on the stacks of experts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import skip_init_on_device
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn

from .base_identity import BaseIdentity, identify_base, settle_base
from .base_names import keep_base_names
from .config import ALL_EXPERTS, MoeQLoraConfig
from .experts import QuantizedExperts, check_convertible, stored_format
from .factor_shapes import check_factor_shapes, check_stored_layers, check_stored_shapes
from .layer import BASE, ExpertsLora
from .linear_lora import with_fast_forward
from .loading import cast_as_loaded, restore_experts, store_experts
from .merge import MergeCheck, in_memory
from .quantization import FourBitFormat, Stack
from .quantized_linear import QuantizedLinear
from .quantized_linear_lora import QuantizedLinearLora
from .report import ExpertsReport, experts_report
from .sharded import (
    ZERO3,
    gather_first,
    gathered,
    refuse_fsdp1,
    refuse_parts,
    refuse_sharded,
    sharded_by,
)
from .targets import (
    check_matched_modules,
    check_not_shared,
    check_patterns,
    check_targets,
    expert_layouts,
    module_names,
    reached_stacks,
    resolve_targets,
    trained_expert_biases,
)
from .training import refuse_liger_head, refuse_optimizers_of_matrices, watch_gradients
from .unadaptable import check_adaptable
from .weighted_adapter import Combination


class MoeQLoraModel(LoraModel):
    """LoRA for MoE models: PEFT's `LoraModel` with `ExpertsLora` layers on the stacks of experts.

    Adding the first adapter converts all experts of the model to the storage in its config, in place and stack by
    stack. Experts that are already converted (`quantize_experts`) are used as they are.

    Args:
        model: the model to adapt.
        config: a `MoeQLoraConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the factors on the meta device, to be loaded from a file.
    """

    merge_check: MergeCheck | None = None
    """Check of the last `merge_and_unload` with second-order rounding."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        keep_base_names(self.model)
        refuse_optimizers_of_matrices(self)
        # PeftModel passes a dictionary and casts the factors afterwards. transformers passes a config and loads the
        # factors in their current dtype, which would round those of a file to 16 bits for a 16-bit model
        if isinstance(peft_config, MoeQLoraConfig):
            self._cast_adapter_dtype(adapter_name)

    def train(self, mode: bool = True) -> MoeQLoraModel:
        if mode:  # Trainer calls this after Liger's patches and before the first forward
            refuse_liger_head(self.model)
        return super().train(mode)

    def _prepare_adapter_config(self, peft_config: MoeQLoraConfig, model_config: dict) -> MoeQLoraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = {ALL_EXPERTS}
        return peft_config

    def _prepare_model(self, peft_config: MoeQLoraConfig, model: nn.Module) -> None:
        """Resolves and checks the config, then converts the experts."""
        recorded = BaseIdentity.of(peft_config.base) if peft_config.is_read else None
        stored = peft_config.stored
        is_loaded = stored is not None and stored.has_layers_of(peft_config)
        _adopt_format(peft_config, model)
        if peft_config.format is not None:
            refuse_fsdp1()
        check_convertible(model, peft_config.format)
        check_not_shared(model)
        layouts = expert_layouts(model)
        names = module_names(model, layouts)
        check_targets(peft_config, names, layouts)
        resolve_targets(peft_config, model, layouts)
        check_matched_modules(peft_config, model, layouts)
        linear = [name for name in names if self._check_target_module_exists(peft_config, name)]
        check_adaptable(linear, model, peft_config.is_read)
        stacks = reached_stacks(peft_config, layouts)
        check_patterns(peft_config, [*linear, *stacks], layouts)
        check_stored_shapes(peft_config, layouts, stacks)
        if is_loaded:
            check_stored_layers(stored.shapes, {*linear, *stacks})
        peft_config.stored = None
        if linear or stacks:
            # with low_cpu_mem_usage, PEFT creates parameters on the meta device here
            skip_init_on_device(store_experts)(model, peft_config.format, progressbar=True)
        settle_base(peft_config, recorded, identify_base(model, stacks))

    def _check_new_adapter_config(self, config: MoeQLoraConfig) -> None:
        _adopt_format(config, self.model)  # before the comparison with the other adapters' formats
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            if other.format != config.format:
                raise ValueError(
                    f"The new adapter requests experts stored as {config.format or '16 bits'}, but adapter {name!r} "
                    f"uses {other.format or '16 bits'}. Adapters of one model share its experts: set the same "
                    "storage, or the same quant_type, blocksize and double_quant, for both."
                )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            self.peft_config.pop(adapter_name, None)
            raise ValueError(
                f"{adapter_name!r} is not a valid adapter name. torch.nn.ModuleDict rejects empty names, names with a "
                "dot, and names of its own attributes. Choose another name."
            )
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # PeftModel removes the config itself, transformers' add_adapter does not
            self.peft_config.pop(adapter_name, None)
            raise
        if not self.peft_config[adapter_name].inference_mode:
            watch_gradients(self.model)

    def _create_and_replace(
        self, lora_config: MoeQLoraConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(target, (Stack, ExpertsLora)):
            lora_config = lora_config.of_experts()
        super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)

    @staticmethod
    def _create_new_module(
        lora_config: MoeQLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        if isinstance(target, Stack):
            return ExpertsLora(target, adapter_name, lora_config, **kwargs)
        if isinstance(target, QuantizedLinear):
            return QuantizedLinearLora(target, adapter_name, lora_config, **kwargs)
        return with_fast_forward(LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, QuantizedLinearLora):
            # PEFT would decode the weight several times to move factors that are on its device already
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for adapter_name in self.active_adapters:
            for _, parameter in trained_expert_biases(model, self.peft_config[adapter_name].bias):
                parameter.requires_grad = True

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, torch.Tensor], config: MoeQLoraConfig
    ) -> dict[str, torch.Tensor]:
        biases = super()._get_learnable_bias_state_dict(model, state_dict, config)
        return biases | {name: state_dict[name] for name, _ in trained_expert_biases(model, config.bias)}

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MoeQLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Like PEFT's, but gathers tensors of a model sharded by FSDP2; all processes must then call it.

        Raises:
            ValueError: tensors of experts are missing, or are shards of ZeRO-3.
        """
        found = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )
        # PEFT reads modules trained in full and embeddings from this dictionary afterwards
        parts = (f".{adapter_name}.", *EMBEDDING_LAYER_NAMES)
        others = [name for name in state_dict if name not in found and any(part in name for part in parts)]
        state_dict.update(gathered({name: state_dict[name] for name in others}))
        found = gathered(found)
        refuse_parts(
            {name: parameter for name, parameter in model.named_parameters() if f".{adapter_name}." in name},
            {**state_dict, **found},
            _expert_factors(model, adapter_name),
        )
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoeQLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if any(adapter_name in layer.merged_adapters for layer in model.modules() if isinstance(layer, LoraLayer)):
            raise ValueError(
                f"Adapter {adapter_name!r} is merged, and its factors cannot be replaced: linear layers need them to "
                "unmerge. Call unmerge_adapter() first."
            )
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        factors = _expert_factors(model, adapter_name)
        for name, factor in factors.items():
            if sharded_by(factor) == ZERO3:
                raise ValueError(f"{name} {gather_first(ZERO3, 'loading an adapter')}")
        expected = {name: tuple(factor.shape) for name, factor in factors.items()}
        check_factor_shapes({key: tuple(tensor.shape) for key, tensor in remapped.items()}, expected)
        return remapped

    def expert_layers(self) -> Iterator[ExpertsLora]:
        return (module for module in self.model.modules() if isinstance(module, ExpertsLora))

    def experts_report(self) -> ExpertsReport:
        """Reports storage, ranks, trainable adapters and computation path of all experts."""
        return experts_report(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Passes `adapter_names`, one for each sample of the batch, to all layers during a call."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is not supported in training mode. Call model.eval() first.")
        self._check_adapter_names([name for name in adapter_names if name != BASE])
        num_beams = kwargs.get("num_beams") or 1
        batch = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        if batch is not None and len(batch) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(batch)} samples. Pass one name "
                "for each sample."
            )
        per_sequence = [name for name in adapter_names for _ in range(num_beams)]

        def add_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "adapter_names": per_sequence}

        handles = [
            module.register_forward_pre_hook(add_names, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))
        ]
        # a compiled model checks attributes but not hooks; the changed attribute causes a recompilation with the hooks
        experts = [module for module in self.modules() if isinstance(module, QuantizedExperts)]
        for module in experts:
            module.adapter_names = tuple(per_sequence)
        try:
            yield
        finally:
            for module in experts:
                module.adapter_names = None
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Combines adapters into a new one with PEFT's methods, for experts separately for each expert.

        Args:
            adapters: names of the adapters.
            weights: weight of each adapter; may be negative.
            adapter_name: name of the new adapter; if it exists, nothing is done.
            combination_type: as in PEFT's `add_weighted_adapter`, which documents the other options too.
            svd_rank: rank of the result of the `svd` types. Default: the largest rank of the adapters.
            svd_clamp: quantile at which the `svd` types clamp values of the factors.
            svd_full_matrices: argument of `torch.linalg.svd` on linear layers; does not change the result.
            svd_driver: argument of `torch.linalg.svd`.
            density: fraction of the values that ties, dare and magnitude_prune keep.
            majority_sign_method: method of ties, `"total"` or `"frequency"`.

        Raises:
            ValueError: the combination type or an adapter is unknown, the ranks differ for a type that requires equal
                ranks, or no config covers the layers of all adapters.
        """
        if adapter_name in self.peft_config:
            return
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"Expected one weight for each adapter, found adapters={adapters}, weights={weights}.")
        kind, rank, targets = self._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        combination = Combination(
            adapters, weights, kind, density, majority_sign_method, svd_clamp, svd_full_matrices, svd_driver
        )
        config = combination.config(self, rank, targets, svd_rank)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self.set_requires_grad(adapter_name, False)
        try:
            for layer in self.model.modules():
                if isinstance(layer, LoraLayer) and adapter_name in layer.r:
                    combination.fill(self, layer, adapter_name)
        except BaseException:
            # remove the incomplete adapter: the next call would find the name and do nothing
            self.delete_adapter(adapter_name)
            raise

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the stacks, in their storage; `unmerge_adapter` restores the stacks bit for bit.

        The same holds for quantized linear layers. After an error, experts and quantized linear layers are unchanged.
        """
        refuse_sharded(self.model, "merging")
        self._check_mergeable(adapter_names)
        layers = [layer for layer in self.model.modules() if isinstance(layer, (ExpertsLora, QuantizedLinearLora))]
        with in_memory.restored_on_error(layers):
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Unmerges all merged adapters; see `merge_adapter`."""
        refuse_sharded(self.model, "unmerging")
        super().unmerge_adapter()

    def merge_and_unload(
        self,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dtype: torch.dtype | None = None,
        rounding: str = "second-order",
        calibration: torch.Tensor | None = None,
    ) -> nn.Module:
        """Merges adapters and removes the tuner from the model.

        Rounding to the nearest 4-bit value can remove much of the trained delta. By default, one forward of the model
        collects the inputs of each layer of experts, and the layer is rounded such that its outputs for these inputs
        change least (`second_order`). Random tokens are sufficient; text of the intended domain is slightly better.
        If the forward fails, the layers before the failure stay merged, and the same call continues with the others.

        The result has the modules trained in full and the trained tokens of the merged adapters.

        After second-order rounding, the merged model is compared with the unmerged adapter on 512 of these tokens. A
        large divergence gives a warning; `merge_check` has the figures (`MergeCheck`).

        Args:
            progressbar: show a progress bar; unlike in PEFT, the default is True.
            safe_merge: as in PEFT, for linear layers; adapters with values that are not finite are always rejected.
            adapter_names: adapters to merge. Default: the active adapters.
            dtype: None requantizes the merged experts. A floating-point dtype restores the experts modules of
                transformers with dequantized and merged stacks, and casts the model as `from_pretrained(dtype=dtype)`
                does, ready for `save_pretrained`. Linear layers of bitsandbytes stay in 4 bits; a `QuantizedLinear`
                becomes an `nn.Linear`.
            rounding: rounding of quantized experts, `"second-order"` or `"nearest"`, which needs no forward.
            calibration: `(N, L)` token ids for the forward. Default: `random_token_ids`.

        Returns:
            The base model, changed in place.

        Raises:
            ValueError: an adapter is unknown, named twice or has values that are not finite, two adapters have a
                module trained in full, `dtype` is not a floating-point dtype, `rounding` is unknown, `calibration` is
                given but not used, or the model is sharded.
        """
        refuse_sharded(self.model, "merging")
        in_memory.refuse_taken_apart(self.model)
        names = self._check_mergeable(adapter_names)
        in_memory.check_options(dtype, rounding, calibration)
        names = in_memory.activate(self, names)
        self.merge_check = reference = None
        if dtype is not None:
            in_memory.merge_densely(self, names, dtype, progressbar)
        elif rounding == "second-order":
            reference = in_memory.merge_for_inputs(self, names, calibration, progressbar)
        merged = super().merge_and_unload(progressbar, safe_merge)
        if dtype is not None:
            cast_as_loaded(merged, dtype)
        if reference is not None:
            self.merge_check = reference.check(merged, progressbar)
        return merged

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        refuse_sharded(self.model, "unloading an adapter")
        in_memory.refuse_taken_apart(self.model)
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        experts = (module for module in model.modules() if isinstance(module, QuantizedExperts))
        has_packed = any(isinstance(module, QuantizedLinear) for module in model.modules())
        if not has_packed and all(module.is_dense for module in experts):
            # nothing is packed: restore the modules of transformers
            restore_experts(model, None)
        return model

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> None:
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"The model has no adapter {', '.join(map(repr, unknown))}. Choose from {sorted(self.peft_config)}."
            )

    def _check_mergeable(self, adapter_names: Sequence[str] | None) -> Sequence[str]:
        """Checks that adapters can be merged and returns their names, by default those of the active adapters."""
        adapter_names = self.active_adapters if adapter_names is None else adapter_names
        self._check_adapter_names(adapter_names)
        if len(set(adapter_names)) < len(adapter_names):
            raise ValueError(f"adapter_names={list(adapter_names)} contains an adapter twice. Pass each name once.")
        for module in self.model.modules():
            if isinstance(module, QuantizedExperts):
                module.check_complete()
        in_memory.check_mergeable(self.model, adapter_names)
        return adapter_names


def _expert_factors(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Factors of an adapter on experts, by their names in the model."""
    return {
        f"{path}.lora_{factor}.{adapter_name}.weight": weight
        for path, layer in model.named_modules()
        if isinstance(layer, ExpertsLora) and adapter_name in layer.lora_A
        for factor, weight in zip("AB", layer.factors(adapter_name))
    }


def _adopt_format(config: MoeQLoraConfig, model: nn.Module) -> None:
    """Sets the format of a new config to that of the loaded model, if the config has the default format.

    Formats that `quant_type` can express are not adopted, since the default may be intended.
    """
    found = stored_format(model)
    if config.is_read or config.format != FourBitFormat() or found is None:
        return
    asked = copy.copy(config)
    asked.set_format(found)
    if asked.storage is not None:
        config.set_format(found)
