"""The tuner: PEFT's LoRA on linear layers and on the stacks of experts."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import skip_init_on_device
from torch import nn
from tqdm.auto import tqdm

from .adapter_check import check_factor_shapes, check_stored_shapes
from .base_identity import BaseIdentity, differing_sample, identify_base
from .config import ALL_EXPERTS, MoeQLoraConfig
from .experts import ExpertsLayout, QuantizedExperts, bias_name, check_convertible
from .gradient_watch import watch_gradients
from .layer import BASE, ExpertsLora
from .loading import cast_as_loaded, restore_experts, store_experts
from .merge.calibration import adapted_projections, config_with_vocabulary, merge_for_inputs, random_token_ids
from .merge.check import MergeCheck, Reference, take_reference
from .quantization import Stack
from .report import ExpertsReport, experts_report
from .targets import (
    UNTIE,
    check_not_shared,
    check_patterns,
    check_targets,
    expert_layouts,
    is_router,
    module_names,
    reached_stacks,
    resolve_targets,
)
from .unadaptable import check_adaptable
from .weighted import Combination, combined_rank

ROUNDINGS = ("second-order", "nearest")


class MoeQLoraModel(LoraModel):
    """LoRA for MoE models: PEFT's `LoraModel`, whose layers on the stacks of experts are `ExpertsLora`.

    When the first adapter is added, the experts of the whole model are converted to the storage that its config names,
    in place and stack by stack; experts converted before (`quantize_experts`) are used as they are.

    Args:
        model: the model to adapt.
        config: a `MoeQLoraConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the factors on the meta device, to be filled from a file.
    """

    merge_check: MergeCheck | None = None
    """Of the last `merge_and_unload` with second-order rounding."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        # PeftModel passes a dictionary and casts afterwards. transformers passes a config and fills the factors in the
        # dtype that they have, which for a 16-bit model would round those of a file
        if isinstance(peft_config, MoeQLoraConfig):
            self._cast_adapter_dtype(adapter_name)

    def _prepare_adapter_config(self, peft_config: MoeQLoraConfig, model_config: dict) -> MoeQLoraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = {ALL_EXPERTS}
        return peft_config

    def _prepare_model(self, peft_config: MoeQLoraConfig, model: nn.Module) -> None:
        """Settles what the config asks for, refuses what can't be had, and only then converts the experts."""
        check_convertible(model, peft_config.storage)
        check_not_shared(model)
        layouts = expert_layouts(model)
        names = module_names(model, layouts)
        check_targets(peft_config, names, layouts)
        resolve_targets(peft_config, model, layouts)
        self._check_matched_modules(peft_config, model, layouts)
        linear = [name for name in names if self._check_target_module_exists(peft_config, name)]
        check_adaptable(linear, model, peft_config.is_read)
        stacks = reached_stacks(peft_config, layouts)
        check_patterns(peft_config, [*linear, *stacks], layouts)
        check_stored_shapes(peft_config, layouts, stacks)
        peft_config.stored = None
        if linear or stacks:
            # PEFT registers parameters on the meta device meanwhile, if asked for low_cpu_mem_usage
            skip_init_on_device(store_experts)(model, peft_config.storage, progressbar=True)
        self._settle_base(peft_config, model, stacks)

    @staticmethod
    def _settle_base(config: MoeQLoraConfig, model: nn.Module, adapted: list[str]) -> None:
        """Remembers what a new adapter is trained on; warns where one is put on weights that it wasn't trained on."""
        found = identify_base(model, adapted)
        if config.base is None or not config.is_read:
            config.base = found.to_dict()
            return
        differing = differing_sample(BaseIdentity.of(config.base), found)
        if differing is not None:
            warnings.warn(
                f"The adapter was trained on other weights: {differing} differs. It has the same shape, so it is "
                f"loaded; it was made for {config.base_model_name_or_path}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _check_matched_modules(
        self, config: MoeQLoraConfig, model: nn.Module, layouts: dict[str, ExpertsLayout]
    ) -> None:
        """Refuses what PEFT would refuse too, but in the middle of the injection."""
        for name, module in model.named_modules():
            if not name or name in layouts or not self._check_target_module_exists(config, name):
                continue
            if not isinstance(module, (nn.Linear, BaseTunerLayer)) and is_router(name, module, layouts):
                raise ValueError(
                    f"target_modules reaches the router {name}, a {type(module).__name__}, which LoRA can't adapt. "
                    f"Take it out, or train it in full with modules_to_save=[{name.rpartition('.')[2]!r}]."
                )
            if isinstance(module, BaseTunerLayer) or hasattr(module, "in_features"):
                continue
            if all(parameter is None or parameter.dim() < 2 for parameter in module._parameters.values()):
                raise ValueError(
                    f"target_modules reaches {name}, a {type(module).__name__}, which has no weight matrix of its own "
                    "for LoRA to adapt. Name the linear layers, inside it or elsewhere."
                )

    def _check_new_adapter_config(self, config: MoeQLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            if other.storage != config.storage:
                raise ValueError(
                    f"The new adapter wants the experts stored as {config.storage or '16 bits'}, but adapter {name!r} "
                    f"has them as {other.storage or '16 bits'}. Adapters of one model share its experts: give both "
                    "the same quant_type, blocksize and double_quant."
                )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            self.peft_config.pop(adapter_name, None)
            raise ValueError(
                f"{adapter_name!r} can't be the name of an adapter: torch's containers have no place for an empty "
                "name, a dot, or the name of one of their own attributes. Choose another."
            )
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # PeftModel takes the config back by itself, transformers' add_adapter does not
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
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for adapter_name in self.active_adapters:
            for _, parameter in _expert_biases(model, self.peft_config[adapter_name].bias):
                parameter.requires_grad = True

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, torch.Tensor], config: MoeQLoraConfig
    ) -> dict[str, torch.Tensor]:
        biases = super()._get_learnable_bias_state_dict(model, state_dict, config)
        return biases | {name: state_dict[name] for name, _ in _expert_biases(model, config.bias)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoeQLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {
            f"{path}.lora_{factor}.{adapter_name}.weight": tuple(weight.shape)
            for path, layer in model.named_modules()
            if isinstance(layer, ExpertsLora) and adapter_name in layer.lora_A
            for factor, weight in zip("AB", layer.factors(adapter_name))
        }
        check_factor_shapes({key: tuple(tensor.shape) for key, tensor in remapped.items()}, expected)
        return remapped

    def expert_layers(self) -> Iterator[ExpertsLora]:
        return (module for module in self.model.modules() if isinstance(module, ExpertsLora))

    def experts_report(self) -> ExpertsReport:
        """What is stored how, what is adapted with which rank, what is trainable, what computes it."""
        return experts_report(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names`, one for each sample of the batch, to every layer for the time of a call."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names can't be passed in training mode; call model.eval() first.")
        self._check_adapter_names([name for name in adapter_names if name != BASE])
        num_beams = kwargs.get("num_beams") or 1
        batch = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        if batch is not None and len(batch) != len(adapter_names):
            raise ValueError(
                f"Length of adapter_names should be the number of samples, but got {len(adapter_names)} names for "
                f"{len(batch)} samples."
            )
        per_sequence = [name for name in adapter_names for _ in range(num_beams)]

        def add_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "adapter_names": per_sequence}

        handles = [
            module.register_forward_pre_hook(add_names, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (LoraLayer, QuantizedExperts, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
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
        """Combines adapters into a new one by PEFT's formulas, on experts for each of them.

        Args:
            adapters: names of adapters.
            weights: one for each; may be negative.
            adapter_name: name of the new one; nothing happens if it exists.
            combination_type: of those that PEFT's `add_weighted_adapter` has, which describes the other options too.
            svd_rank: rank of the result of the `svd` forms. Default: the largest.
            svd_clamp: quantile at which values of the factors are cut, for the `svd` forms.
            svd_full_matrices: of `torch.linalg.svd`, on linear layers; the result doesn't depend on it.
            svd_driver: of `torch.linalg.svd`.
            density: share of the values that ties, dare and magnitude_prune keep.
            majority_sign_method: of ties, `"total"` or `"frequency"`.

        Raises:
            ValueError: an unknown combination type or adapter, ranks that differ where one is needed, or adapters of
                which no config reaches all layers.
        """
        if adapter_name in self.peft_config:
            return
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"One weight for each adapter was expected, got adapters={adapters}, weights={weights}.")
        kind, rank, targets = self._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        configs = [self.peft_config[name] for name in adapters]
        expert_rank = combined_rank(kind, [config.largest_expert_r for config in configs], svd_rank)
        unit = configs[0].scaling
        combined = replace(
            configs[0],
            r=rank,
            lora_alpha=1 / unit(rank, 1.0),
            expert_r=expert_rank,
            expert_alpha=1 / unit(expert_rank, 1.0),
            target_modules=targets,
            rank_pattern={},
            alpha_pattern={},
        )
        self._check_reach(combined, adapters)
        self.peft_config[adapter_name] = combined
        self.inject_adapter(self.model, adapter_name)
        self.set_requires_grad(adapter_name, False)
        combine = Combination(
            adapters, weights, kind, density, majority_sign_method, svd_clamp, svd_full_matrices, svd_driver
        )
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer) and adapter_name in layer.r:
                combine.fill(self, layer, adapter_name)

    def _check_reach(self, config: MoeQLoraConfig, adapters: Sequence[str]) -> None:
        """Refuses a combination whose config would leave out a layer that one of the adapters has."""
        for path, layer in self.model.named_modules():
            is_adapted = isinstance(layer, LoraLayer) and any(name in layer.r for name in adapters)
            if is_adapted and not check_target_module_exists(config, path):
                raise ValueError(
                    f"The adapters {list(adapters)} reach different layers by layers_to_transform or exclude_modules: "
                    f"{path} would be left out. Combine adapters that share these options."
                )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the stacks, in their storage; `unmerge_adapter` gives the stacks back bit for bit.

        After an error experts are as they were before the call.
        """
        self._check_mergeable(adapter_names)
        merged_before = {layer: list(layer.merged_adapters) for layer in self.expert_layers()}
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except ValueError:
            for layer, names in merged_before.items():
                if layer.merged_adapters != names:
                    layer.unmerge()
                    layer.merge(adapter_names=names)
            raise

    def merge_and_unload(
        self,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dtype: torch.dtype | None = None,
        rounding: str = "second-order",
        calibration: torch.Tensor | None = None,
    ) -> nn.Module:
        """Merges adapters and takes the tuner off the model.

        Rounding to the nearest 4-bit value can lose much of what was trained. By default the model is run once, and
        each layer of experts is rounded such that what it gives for its inputs changes least (`second_order`). Random
        tokens do for that; a text like the one that the model is for does a little better. Should the forward fail,
        the layers that it has passed are merged for good, and the same call goes on with the others.

        After second-order rounding the merged model is run too, on 512 of these tokens, and a warning tells if it is
        far from the live adapter; `merge_check` has the figures (`MergeCheck`).

        Args:
            progressbar: show one; PEFT's own default is not to.
            safe_merge: as in PEFT, for linear layers; adapters with values that are not finite are always refused.
            adapter_names: what to merge. Default: the active adapters.
            dtype: None requantizes the merged experts; a floating dtype gives the classes' own experts modules back,
                with dequantized and merged stacks, and the model as `from_pretrained(dtype=dtype)` would, ready for
                `save_pretrained`. Linear layers in 4 bits stay so.
            rounding: of experts in 4 bits, `"second-order"` or `"nearest"`, which needs no forward.
            calibration: `(N, L)` token ids for the forward. Default: `random_token_ids`.

        Returns:
            The base model, changed in place.

        Raises:
            ValueError: an adapter is unknown or has values that are not finite, `dtype` is none of floating point,
                `rounding` is unknown, or `calibration` is given where nothing is rounded by it.
        """
        self._check_mergeable(adapter_names)
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} is unknown; choose one of {ROUNDINGS}.")
        if calibration is not None and (dtype is not None or rounding == "nearest"):
            raise ValueError(
                "calibration is for experts that are rounded to 4 bits by second-order rounding; leave it out, or "
                "dtype and rounding."
            )
        if calibration is not None and (
            not isinstance(calibration, torch.Tensor)
            or calibration.dim() != 2
            or calibration.is_floating_point()
            or not calibration.numel()
        ):
            raise ValueError("calibration has to be a tensor of token ids, (sequences, length), and not empty.")
        self.merge_check = None
        if dtype is None:
            reference = None
            if rounding == "second-order":
                reference, adapter_names = self._merge_for_inputs(adapter_names, calibration, progressbar)
            merged = super().merge_and_unload(progressbar, safe_merge, adapter_names)
            if reference is not None:
                self.merge_check = reference.check(merged)
            return merged
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype={dtype} can't hold merged weights; choose torch.bfloat16, float16 or float32.")
        names = self.active_adapters if adapter_names is None else adapter_names
        layers = [(path, layer) for path, layer in self.model.named_modules() if isinstance(layer, ExpertsLora)]
        for path, layer in tqdm(layers, desc="Merging experts", disable=not progressbar):
            parent, _, name = path.rpartition(".")
            self._replace_module(self.model.get_submodule(parent), name, layer.merged_dense(dtype, names), layer)
        restore_experts(self.model, dtype)
        if dtype == torch.float32:
            cast_as_loaded(self.model, dtype)  # before deltas of linear layers are added, which 16 bits would round
        merged = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        cast_as_loaded(merged, dtype)
        return merged

    def _merge_for_inputs(
        self, adapter_names: list[str] | None, calibration: torch.Tensor | None, progressbar: bool
    ) -> tuple[Reference | None, list[str] | None]:
        """Merges the quantized experts that adapters reach; what is left, PEFT does.

        Returns:
            What the live model gave, None if there are no such experts; and the adapters to be merged into the other
            layers, with those that were merged before.
        """
        tuner_layers = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        merged_before = [name for layer in tuner_layers for name in layer.merged_adapters]
        asked_for = self.active_adapters if adapter_names is None else adapter_names
        names = list(dict.fromkeys([*merged_before, *asked_for]))
        layers = {
            path: module
            for path, module in self.model.named_modules()
            if isinstance(module, QuantizedExperts) and not module.is_dense and adapted_projections(module, names)
        }
        if not layers:
            return None, adapter_names
        if calibration is None:
            config = config_with_vocabulary(self.model)
            if config is None:
                raise ValueError(
                    f"{type(self.model).__name__} has no config that tells its vocabulary. Pass token ids as "
                    "calibration, or rounding='nearest'."
                )
            calibration = random_token_ids(config)
        for layer in tuner_layers:
            if layer.merged:
                layer.unmerge()
        reference = take_reference(self, names, calibration)
        # each at once: should the forward fail later, what is merged is not merged again
        missed = merge_for_inputs(self.model, layers, names, calibration, self._unwrap, progressbar)
        if missed:
            warnings.warn(
                f"The tokens of the calibration didn't reach {len(missed)} layers of experts, {missed[0]} first; "
                "they are rounded to the nearest value.",
                RuntimeWarning,
                stacklevel=3,
            )
        return reference, names

    def _unwrap(self, experts: QuantizedExperts) -> None:
        """Puts merged stacks in the place of their adapters."""
        for projection in experts.layout.projections:
            layer = experts.get_submodule(projection)
            if isinstance(layer, ExpertsLora):
                self._replace_module(experts, projection, layer.base_layer, layer)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        if all(module.is_dense for module in model.modules() if isinstance(module, QuantizedExperts)):
            # nothing is packed: the classes' own modules do
            restore_experts(model, None)
        return model

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> None:
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"There is no adapter {unknown}; there are {sorted(self.peft_config)}.")

    def _check_mergeable(self, adapter_names: Sequence[str] | None) -> None:
        """Refuses a broken adapter before the first layer is merged, so that the model stays as it was.

        With or without `safe_merge`: 4-bit codes could not show what is not finite.
        """
        adapter_names = self.active_adapters if adapter_names is None else adapter_names
        self._check_adapter_names(adapter_names)
        self._check_not_tied(adapter_names)
        for layer in self.model.modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            for container in layer.adapter_layer_names:
                for name, factor in getattr(layer, container).items():
                    tensors = [factor] if isinstance(factor, torch.Tensor) else factor.parameters()
                    if name in adapter_names and not all(torch.isfinite(tensor).all() for tensor in tensors):
                        raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def _check_not_tied(self, adapter_names: Sequence[str]) -> None:
        """Refuses a delta of one of two layers that have one weight: merged, it would be in both."""
        holders: dict[nn.Parameter, list[str]] = defaultdict(list)
        for path, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                holders[parameter].append(path.removesuffix(".base_layer"))
        for path, layer in self.model.named_modules():
            if isinstance(layer, ExpertsLora) or not isinstance(layer, LoraLayer):
                continue  # two stacks that are tied are merged into two
            if not any(name in layer.scaling for name in adapter_names):
                continue
            # PEFT's layer on nn.MultiheadAttention has several weights, none of them tied
            weight = getattr(layer.get_base_layer(), "weight", None)
            others = [holder for holder in holders.get(weight, ()) if holder != path]
            if others:
                raise ValueError(
                    f"The adapter changes {path} alone, but {others[0]} has the same weight and would change too. "
                    f"{UNTIE}"
                )


def _expert_biases(model: nn.Module, bias: str) -> Iterator[tuple[str, nn.Parameter]]:
    """`(name, parameter)` of the experts' biases that a config's `bias` makes trainable."""
    if bias == "none":
        return
    adapted = {id(layer.get_base_layer()) for layer in model.modules() if isinstance(layer, ExpertsLora)}
    for path, experts in model.named_modules():
        if not isinstance(experts, QuantizedExperts) or not experts.layout.has_bias:
            continue
        for projection in experts.layout.projections:
            if bias == "all" or id(experts.stack(projection)) in adapted:
                yield f"{path}.{bias_name(projection)}", experts.projection_bias(projection)
