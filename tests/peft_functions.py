"""What PEFT's functions do with experts: each is called on stacks of experts and on linear layers in their place.

`python tests/peft_functions.py` writes docs/peft.md from this table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from linear_experts import Ours, Stock, backward, per_expert, set_factors
from peft import helpers, optimizers
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap
from tiny_models import logits, token_ids
from torch import nn

Side = Ours | Stock
Case = Callable[[Side, Path], Any]


@dataclass(frozen=True)
class Works:
    """Both sides give what the case returns to 1e-6: numbers, dictionaries of tensors by name, models.

    Args:
        case: gets a side and a directory; what it returns is compared.
        note: for the reader of the table.
    """

    case: Case
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """Our side raises an error that has the sentence, and the factors are as before.

    Args:
        case: gets our side and a directory.
        sentence: part of the error.
        instead: what to do, for the reader of the table.
    """

    case: Case
    sentence: str
    instead: str


def _layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _on_layers(method: str, *args: Any, side: Side, directory: Path, **options: Any) -> nn.Module:
    model = side.adapted(side.config(**options))
    for layer in _layers(model):
        layer.scale_layer(3.0)
        getattr(layer, method)(*args)
    return model


def layers(method: str, *args: Any, **options: Any) -> Works:
    return Works(lambda side, directory: _on_layers(method, *args, side=side, directory=directory, **options))


def _deltas(side: Side, directory: Path) -> dict[str, torch.Tensor]:
    model = side.adapted(side.config(use_rslora=True))
    return per_expert((f"{path}.", layer.get_delta_weight("default")) for path, layer in _named_layers(model))


def _named_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]


def _layer_status(side: Side, directory: Path) -> dict[str, Any]:
    found = {}
    for status in side.adapted(side.config(), side.config(r=2)).get_layer_status():
        fields = {name: getattr(status, name) for name in status.__dataclass_fields__}
        del fields["name"], fields["module_type"]
        found.update(per_expert([(f"base_model.model.{status.name}", repr(sorted(fields.items())))]))
    return found


def _model_status(side: Side, directory: Path) -> dict[str, Any]:
    status = side.adapted(side.config(), side.config(r=2)).get_model_status()
    names = ("trainable_params", "total_params", "enabled", "active_adapters", "merged_adapters", "requires_grad")
    return {name: getattr(status, name) for name in (*names, "available_adapters", "devices")}


def _trained(side: Side, make: Callable[[nn.Module], torch.optim.Optimizer], **options: Any) -> nn.Module:
    model = side.adapted(side.config(**options))
    optimizer = make(model)
    for _ in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _loraplus(side: Side, directory: Path) -> tuple:
    made = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        # SGD, because Adam divides gradients that are nearly zero by themselves
        made.append(
            optimizers.create_loraplus_optimizer(
                model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
            )
        )
        return made[0]

    model = _trained(side, make)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        (group["lr"], group["weight_decay"], sorted(per_expert((names[id(p)], 0) for p in group["params"])))
        for group in made[0].param_groups
    ]
    return model, groups


def _switched(side: Side, directory: Path, change: Callable[[nn.Module], Any], training: bool = False) -> tuple:
    model = side.adapted(side.config(), side.config(r=2, lora_alpha=8))
    result = change(model)
    return model, result if isinstance(result, (int, float, str, bool, tuple)) else None


def switched(change: Callable[[nn.Module], Any], note: str = "") -> Works:
    return Works(partial(_switched, change=change), note)


def _disabled(side: Side, directory: Path) -> tuple:
    model = side.adapted()
    with model.disable_adapter():
        disabled = logits(model, token_ids())
    return disabled, model


def _rescaled(side: Side, directory: Path) -> tuple:
    model = side.adapted()
    with helpers.rescale_adapter_scale(model, 0.3):
        rescaled = logits(model, token_ids())
    return rescaled, model


def _without_casting(side: Side, directory: Path) -> tuple:
    model = side.adapted()
    with helpers.disable_input_dtype_casting(model):
        return logits(model, token_ids()), model


PATTERN = r"layers\.1\.mlp\.experts(\.\d+)?\.gate_up_proj"
COMBINATIONS = (
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)


def combined(kind: str, side: Side, directory: Path, first: dict | None = None, second: dict | None = None) -> tuple:
    """The combination's deltas, since factors of an SVD are unique up to their sign."""
    model = side.adapted(side.config(**(first or {})), side.config(lora_alpha=8, **(second or {})))
    # small, because singular values that are close to each other amplify rounding
    set_factors(model, std=0.05)
    # `density` 1 drops nothing, so that random choices don't matter
    density = None if kind in ("svd", "linear", "cat") else 1.0 if kind.startswith("dare") else 0.6
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "new", combination_type=kind, density=density)
    model.set_adapter("new")
    if isinstance(side, Stock):
        for layer in _layers(model):
            # PEFT leaves the factor of rsLoRA on what is already scaled, so that it gives sqrt(r) times the sum
            layer.scaling["new"] = 1.0
    reached = [(path, layer) for path, layer in _named_layers(model) if "new" in layer.lora_A]
    deltas = per_expert((f"{path}.", layer.get_delta_weight("new")) for path, layer in reached)
    return logits(model, token_ids()), deltas


def _combined_all(side: Side, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {kind: combined(kind, side, directory) for kind in COMBINATIONS}
    for kind in ("svd", "cat"):
        found[f"{kind}, ranks"] = combined(kind, side, directory, {}, {"r": 2})
        found[f"{kind}, pattern"] = combined(kind, side, directory, {"rank_pattern": {PATTERN: 6}}, {"r": 2})
        found[f"{kind}, layers"] = combined(kind, side, directory, {}, {"target_modules": side.targets[:1]})
    for kind in ("svd", "linear", "cat", "ties"):
        found[f"{kind}, rslora"] = combined(kind, side, directory, {"use_rslora": True}, {"use_rslora": True})
    return found


def _merged(side: Side, directory: Path) -> tuple:
    model = side.adapted(side.config(), side.config(r=2))
    model.merge_adapter(["default", "second"])
    merged = logits(model, token_ids())
    model.unmerge_adapter()
    return merged, model


def _merge_and_unload(side: Side, directory: Path) -> dict[str, torch.Tensor]:
    merged = side.adapted(side.config(rank_pattern={PATTERN: 6})).merge_and_unload(safe_merge=True)
    return _base_state(merged.state_dict())


def _unload(side: Side, directory: Path) -> dict[str, torch.Tensor]:
    return _base_state(side.adapted().unload().state_dict())


def _base_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removesuffix(".weight"): value for name, value in per_expert(state.items()).items()}


def _base_round_trip(side: Side, directory: Path) -> tuple:
    model, base = side.adapted(), side.base()
    got = peft.get_base_model_state_dict(model)
    assert got.keys() == base.state_dict().keys()
    result = peft.set_base_model_state_dict(model, {name: 1.1 * value for name, value in got.items()})
    return _base_state(got), model, list(result.missing_keys), list(result.unexpected_keys)


def _state_round_trip(side: Side, directory: Path) -> tuple:
    model = side.adapted(side.config(modules_to_save=["norm"]), side.config(r=2, modules_to_save=["norm"]))
    found = []
    for options in ({}, {"adapter_name": "second"}, {"save_embedding_layers": True}, {"unwrap_compiled": True}):
        state = peft.get_peft_model_state_dict(model, **options)
        found.append(per_expert(state.items()))
    state = peft.get_peft_model_state_dict(model, state_dict=model.state_dict())
    for options in ({}, {"low_cpu_mem_usage": True}, {"ignore_mismatched_sizes": True}):
        other = side.adapted(side.config(modules_to_save=["norm"]), side.config(r=2, modules_to_save=["norm"]))
        set_factors(other, std=0.3)
        result = peft.set_peft_model_state_dict(other, dict(state), **options)
        found += [other, list(result.unexpected_keys)]
    return tuple(found)


def _saved(side: Side, directory: Path, **options: Any) -> Path:
    # gate is the router: a module trained in full beside experts
    model = side.adapted(side.config(modules_to_save=["gate"], rank_pattern={PATTERN: 6}, **options))
    model.save_pretrained(directory / type(side).__name__)
    return directory / type(side).__name__


def _loaded(side: Side, directory: Path) -> tuple:
    path = _saved(side, directory)
    found: list[Any] = [per_expert(peft.load_peft_weights(str(path), device="cpu").items())]
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}):
        model = peft.PeftModel.from_pretrained(side.base(), path, torch_device="cpu", **options)
        model.load_adapter(path, "other", torch_device="cpu", **options)
        found.append(model)
    return tuple(found)


def _loaded_on_bf16(side: Side, directory: Path) -> tuple:
    path = _saved(side, directory)
    found = []
    for autocast in (True, False):
        for trainable in (True, False):
            model = peft.PeftModel.from_pretrained(
                side.base(torch.bfloat16), path, is_trainable=trainable, autocast_adapter_dtype=autocast
            )
            model.add_adapter("other", side.config(modules_to_save=["gate"]))
            named = model.named_parameters()
            found.append(dict(per_expert((n, f"{p.dtype} {p.requires_grad}") for n, p in named)))
    return tuple(found)


def _injected(side: Side, directory: Path) -> tuple:
    first = peft.inject_adapter_in_model(side.config(), side.base())
    set_factors(first)
    state = peft.get_peft_model_state_dict(first)
    again = peft.inject_adapter_in_model(side.config(), side.base(), state_dict=state)
    peft.set_peft_model_state_dict(again, state)
    empty = peft.inject_adapter_in_model(side.config(), side.base(), low_cpu_mem_usage=True)
    return first, again, per_expert((name, str(p.device)) for name, p in empty.named_parameters())


def _swapped(side: Side, directory: Path) -> nn.Module:
    model = side.adapted()
    new = {name: 2 * value for name, value in model.state_dict().items() if ".lora_" in name}
    hotswap.hotswap_adapter_from_state_dict(model, new, "default", side.config(lora_alpha=10))
    return model


def _mixed_batch(side: Side, directory: Path) -> torch.Tensor:
    model, samples, names = side.adapted(side.config(), side.config(r=2)), token_ids(batch=3), ("second", "default")
    if isinstance(side, Ours) and not isinstance(side, Stock):
        return logits(model, samples, adapter_names=[*names, "__base__"])
    # PEFT can't mix adapters in a layer that sees tokens of all samples at once
    rows = []
    for name, sample in zip(names, samples):
        model.set_adapter(name)
        rows.append(logits(model, sample[None]))
    with model.disable_adapter():
        return torch.cat([*rows, logits(model, samples[-1:])])


def _signatures(side: Side, directory: Path) -> tuple:
    model = side.adapted()
    helpers.update_forward_signature(model)
    helpers.update_generate_signature(model)
    helpers.update_signature(model)
    return model, model.generate(token_ids(), max_new_tokens=4, do_sample=False)


def _cast(side: Side, directory: Path) -> dict[str, str]:
    model = side.adapted(dtype=torch.float16)
    peft.cast_mixed_precision_params(model, dtype=torch.float16)
    return {name: str(p) for name, p in per_expert((n, p.dtype) for n, p in model.named_parameters()).items()}


def _prepared(side: Side, directory: Path) -> nn.Module:
    model = peft.prepare_model_for_kbit_training(side.base(torch.bfloat16), use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, side.config())
    set_factors(model)
    return model


def _from_dict(side: Side, directory: Path) -> nn.Module:
    config = peft.get_peft_config(side.config().to_dict())
    model = peft.get_peft_model(side.base(), config)
    set_factors(model)
    return model


def _is_peft_model(side: Side, directory: Path) -> bool:
    return helpers.check_if_peft_model(str(_saved(side, directory)))


def _optimized(function: Callable, side: Side, directory: Path, **options: Any) -> None:
    model = side.adapted()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = function(model, **options)
    backward(model)
    try:
        optimizer.step()
    finally:
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def _padded(side: Side, directory: Path) -> None:
    model = side.adapted()
    before = logits(model, token_ids())
    try:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    finally:
        # scalings of linear layers are tensors by then, which multiply in another order
        torch.testing.assert_close(logits(model, token_ids()), before, rtol=1e-5, atol=1e-5)


def _hotswap(side: Side, directory: Path) -> None:
    model, path = side.adapted(side.config(modules_to_save=["gate"])), _saved(side, directory)
    before = logits(model, token_ids())
    try:
        hotswap.hotswap_adapter(model, str(path), "default", torch_device="cpu")
    finally:
        assert torch.equal(logits(model, token_ids()), before)


def _transformers_hotswap(side: Side, directory: Path) -> None:
    path, model = str(_saved(side, directory)), side.base()
    model.load_adapter(path, adapter_name="default")
    before = logits(model, token_ids())
    try:
        model.load_adapter(path, adapter_name="default", hotswap=True)
    finally:
        assert torch.equal(logits(model, token_ids()), before)


def _xlora(side: Side, directory: Path) -> None:
    path, base = str(_saved(side, directory)), side.base()
    base.config.use_cache = False
    peft.get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters={"0": path}))


def _arrow(side: Side, directory: Path) -> None:
    path = str(_saved(side, directory))
    peft.create_arrow_model(side.base(), [path, path], peft.ArrowConfig(top_k=1))


EVA = "init_lora_weights='eva' is not supported for fused experts"
LORA_GA = "lora_ga_config="
CONVERT = "Some module types on this model do not support LoRA conversion: <class 'peft_moe_qlora.layer.ExpertsLora'>"
INSTEAD_CONVERT = "`peft-moe-qlora convert` writes the adapter in the layouts of other tools."
INSTEAD_OPTIMIZER = "Use an elementwise optimizer, such as AdamW, or LoRA+, or adapt linear layers only."

TABLE: dict[str, Works | Refused] = {
    # peft
    "get_peft_model": Works(lambda side, directory: side.adapted(side.config(rank_pattern={PATTERN: 6}))),
    "get_peft_config": Works(_from_dict),
    "PeftModel.from_pretrained, load_adapter": Works(_loaded, "With every option, and with modules_to_save."),
    "load_peft_weights": Works(lambda side, directory: _loaded(side, directory)[0]),
    "autocast_adapter_dtype": Works(_loaded_on_bf16, "Dtypes and requires_grad on 16-bit bases."),
    "inject_adapter_in_model": Works(_injected, "With and without state_dict and low_cpu_mem_usage."),
    "get_peft_model_state_dict": Works(_state_round_trip),
    "set_peft_model_state_dict": Works(_state_round_trip),
    "get_base_model_state_dict": Works(_base_round_trip, "For 4-bit experts, the keys are those of the codes."),
    "set_base_model_state_dict": Works(_base_round_trip),
    "get_layer_status": Works(_layer_status),
    "get_model_status": Works(_model_status),
    "cast_mixed_precision_params": Works(_cast),
    "prepare_model_for_kbit_training": Works(
        _prepared, "Casts 16-bit experts to fp32; `prepare_model_for_training` doesn't."
    ),
    "convert_to_lora": Refused(
        lambda side, directory: peft.convert_to_lora(side.adapted(), rank=2), CONVERT, INSTEAD_CONVERT
    ),
    "save_as_lora": Refused(
        lambda side, directory: peft.save_as_lora(directory, side.adapted(), rank=2), CONVERT, INSTEAD_CONVERT
    ),
    "create_arrow_model": Refused(_arrow, "LoRA adapters must only target Linear-like layers", "Merge them instead."),
    "XLoraModel": Refused(
        _xlora,
        "XLoraModel and other methods that combine adapters do not support experts",
        "`add_weighted_adapter` combines adapters.",
    ),
    "PeftMixedModel": Refused(
        lambda side, directory: peft.get_peft_model(side.base(), side.config(), mixed=True),
        "is not compatible with the `PeftMixedModel`",
        "Adapters of this method can be combined with each other.",
    ),
    "initialize_lora_eva_weights": Refused(
        lambda side, directory: side.config(init_lora_weights="eva"), EVA, "Rejected by the config."
    ),
    "get_eva_state_dict": Refused(
        lambda side, directory: side.config(init_lora_weights="eva"), EVA, "Rejected by the config."
    ),
    "preprocess_loraga": Refused(
        lambda side, directory: side.config(lora_ga_config=peft.LoraGAConfig()), LORA_GA, "Rejected by the config."
    ),
    "PeftModel.disable_adapter": Works(_disabled),
    "PeftModel.set_adapter": switched(lambda model: model.set_adapter("second")),
    "PeftModel.set_requires_grad": switched(lambda model: model.set_requires_grad("second")),
    "PeftModel.delete_adapter": switched(lambda model: model.delete_adapter("default")),
    "PeftModel.get_nb_trainable_parameters, print_trainable_parameters": switched(
        lambda model: (*model.get_nb_trainable_parameters(), model.print_trainable_parameters())
    ),
    "adapter_names in a forward": Works(_mixed_batch),
    "LoraModel.set_adapter with several": switched(lambda model: model.base_model.set_adapter(["default", "second"])),
    "LoraModel.disable_adapter_layers": switched(lambda model: model.base_model.disable_adapter_layers()),
    "LoraModel.enable_adapter_layers": switched(
        lambda model: (model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers())
    ),
    "LoraModel.add_weighted_adapter": Works(
        _combined_all,
        f"All of {', '.join(COMBINATIONS)}. With rsLoRA, PEFT's result is sqrt(r) times too large; this one is not.",
    ),
    "LoraModel.merge_adapter, unmerge_adapter": Works(_merged, "In 4 bits, merged weights are rounded."),
    "LoraModel.merge_and_unload": Works(_merge_and_unload, "In 4 bits, merged weights are rounded."),
    "LoraModel.unload": Works(_unload),
    "LoraLayer.set_scale": layers("set_scale", "default", 0.3, use_rslora=True),
    "LoraLayer.scale_layer": layers("scale_layer", 0.3),
    "LoraLayer.unscale_layer": layers("unscale_layer"),
    "LoraLayer.unscale_layer(scale)": layers("unscale_layer", 2.0),
    "LoraLayer.get_delta_weight": Works(_deltas, "Returns a stack, `(E, out, in)`."),
    # peft.helpers
    "update_forward_signature": Works(_signatures),
    "update_generate_signature": Works(_signatures),
    "update_signature": Works(_signatures),
    "check_if_peft_model": Works(_is_peft_model),
    "rescale_adapter_scale": Works(_rescaled),
    "disable_input_dtype_casting": Works(_without_casting),
    # peft.utils
    "hotswap_adapter": Refused(
        _hotswap,
        "Hotswapping only supports LORA but MOE_QLORA was passed",
        "`load_adapter` with the name of an existing adapter replaces its factors in place, if the ranks match.",
    ),
    "transformers' load_adapter(hotswap=True)": Refused(
        _transformers_hotswap, "Hotswapping is currently only supported for LoRA", "As for `hotswap_adapter`."
    ),
    "prepare_model_for_compiled_hotswap": Refused(
        _padded, "A stack of experts has no attribute `weight`", "As for `hotswap_adapter`."
    ),
    "hotswap_adapter_from_state_dict": Works(
        _swapped, "For adapters of one rank without expert_alpha; PEFT checks neither."
    ),
    # optimizers
    "create_loraplus_optimizer": Works(_loraplus),
    "create_lorafa_optimizer": Refused(
        partial(_optimized, optimizers.create_lorafa_optimizer, r=4, lora_alpha=6, lr=1e-2),
        "create_lorafa_optimizer supports only 2-D factors",
        INSTEAD_OPTIMIZER,
    ),
    "create_riemannian_optimizer": Refused(
        partial(_optimized, optimizers.create_riemannian_optimizer, optimizer_cls=torch.optim.SGD, lr=1e-2),
        "create_riemannian_optimizer supports only 2-D factors",
        INSTEAD_OPTIMIZER,
    ),
    "torch.optim.Muon": Refused(
        lambda side, directory: torch.optim.Muon([p for p in side.adapted().parameters() if p.requires_grad]),
        "Muon only supports 2D parameters",
        INSTEAD_OPTIMIZER,
    ),
}

NOT_OF_LORA = {
    "bloom_model_postprocess_past_key_value": "prefix tuning",
    "compose_cartridge_adapters": "cartridges",
    "initialize_kv_prefix_from_past_key_values": "prefix tuning",
    "initialize_kv_prefix_from_text": "prefix tuning",
    "prompt_embeddings_from_past_key_values": "prompt tuning",
    "shift_tokens_right": "text of encoder-decoder models",
    "map_cache_to_layer_device_map": "prefix tuning",
    "find_kappa_target_modules": "chooses targets of a model without adapters",
    "get_gptqmodel_quant_linear": "another quantization",
    "get_quantization_config": "another quantization",
    "get_quantization_kwargs": "another quantization",
    "quantization_extra_repr": "inside PEFT's layers",
    "resolve_quantization_backend": "inside PEFT's layers",
    "id_tensor_storage": "about tensors",
    "infer_device": "about the machine",
    "transpose": "about tensors",
    "register_peft_method": "for methods of other packages",
    "set_additional_trainable_modules": "inside get_peft_model",
}
"""Exported by PEFT, and nothing that experts could be wrong for."""

NO_CALCULATION = {
    "active_adapter",
    "active_adapters",
    "active_peft_config",
    "adapter_layer_names",
    "base_model_torch_dtype",
    "bias",
    "create_or_update_model_card",
    "disable_adapters",
    "frozen_peft_weight_names",
    "get_base_layer",
    "get_base_model",
    "get_model_config",
    "get_prompt",
    "get_prompt_embedding_to_save",
    "has_active_enabled_adapter",
    "lora_variants",
    "merged",
    "merged_adapters",
    "modules_to_save",
    "other_param_names",
    "peft_config",
    "prefix",
    "prepare_model_for_gradient_checkpointing",
    "push_to_hub",
    "quantization_backend",
    "resolve_lora_variant",
    "supports_lora_conversion",
    "target_module_mapping",
    "tuner_layer_cls",
    "uses_shared_state",
    "weight",
}
"""Public attributes of PEFT's classes that say what there is, or what cards and uploads are made of."""

BY_OTHER_ROWS = {
    "add_adapter",
    "enable_adapters",
    "generate",
    "get_base_weight",
    "inject_adapter",
    "merge",
    "reset_lora_parameters",
    "save_pretrained",
    "set_base_weight",
    "subtract_mutated_init",
    "unmerge",
    "update_layer",
}
"""Public methods that rows go through, or, of `get_base_weight` and so on, the tests of merging and initialization."""

REFUSED_BY_THE_CONFIG = {
    f"{kind}_init" for kind in ("corda", "loftq", "lora_ga", "mica", "olora", "orthogonal", "pissa")
}

NOTES = {
    "replace_lora_weights_loftq": "Replaces the factors of bitsandbytes' linear layers and leaves those of experts. "
    "It needs a GPU and is not tested. `loftq_config` is rejected."
}


def exported() -> set[str]:
    """The public functions of PEFT that could be called with a model."""
    names = set()
    for module in (peft, optimizers, helpers, peft.utils):
        listed = getattr(module, "__all__", None)
        if listed is None:
            listed = [
                name for name, value in vars(module).items() if getattr(value, "__module__", "") == "peft.helpers"
            ]
        names |= {name for name in listed if type(getattr(module, name)) is type(exported) and name[0] != "_"}
    return names


def methods() -> set[str]:
    """The public attributes that PEFT's classes have beyond a module's."""
    classes = (peft.PeftModel, peft.LoraModel, LoraLayer)
    return {name for cls in classes for name in dir(cls) if name[0] != "_"} - set(dir(nn.Module))


def documentation() -> str:
    """The page docs/peft.md."""
    lines = [
        "# PEFT's functions on experts",
        "",
        "Generated by `python tests/peft_functions.py`; `tests/test_lora_parity.py` tests every row. *Works*: values,",
        "names and flags match those of PEFT's LoRA on a model whose experts are `nn.Linear` layers, expert for",
        "expert. *Rejected*: the call raises the quoted error.",
        "",
        "| function | on experts | |",
        "|--|--|--|",
    ]
    for name, row in TABLE.items():
        if isinstance(row, Works):
            lines.append(f"| `{name}` | works | {row.note} |")
        else:
            lines.append(f'| `{name}` | rejected: "{row.sentence}" | {row.instead} |')
    lines += [f"| `{name}` | linear layers only | {note} |" for name, note in NOTES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs" / "peft.md"
    page.write_text(documentation())
    print(page, file=sys.stderr)
