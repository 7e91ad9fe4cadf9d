"""Calls of PEFT's functions, for the table in peft_functions.py: each on stacks of experts or on linear layers.

A case is called with a side (which builds the model) and a directory, and returns what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
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


def _layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def on_layers(method: str, *args: Any, side: Side, directory: Path, **options: Any) -> nn.Module:
    model = side.adapted(side.config(**options))
    for layer in _layers(model):
        layer.scale_layer(3.0)
        getattr(layer, method)(*args)
    return model


def deltas(side: Side, directory: Path) -> dict[str, torch.Tensor]:
    model = side.adapted(side.config(use_rslora=True))
    return per_expert((f"{path}.", layer.get_delta_weight("default")) for path, layer in _named_layers(model))


def _named_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]


def layer_status(side: Side, directory: Path) -> dict[str, Any]:
    found = {}
    for status in side.adapted(side.config(), side.config(r=2)).get_layer_status():
        fields = {name: getattr(status, name) for name in status.__dataclass_fields__}
        del fields["name"], fields["module_type"]
        found.update(per_expert([(f"base_model.model.{status.name}", repr(sorted(fields.items())))]))
    return found


def model_status(side: Side, directory: Path) -> dict[str, Any]:
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


def loraplus(side: Side, directory: Path) -> tuple:
    made = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        # SGD, because Adam divides nearly-zero gradients by their own size
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


def switched(side: Side, directory: Path, change: Callable[[nn.Module], Any], training: bool = False) -> tuple:
    model = side.adapted(side.config(), side.config(r=2, lora_alpha=8))
    result = change(model)
    return model, result if isinstance(result, (int, float, str, bool, tuple)) else None


def disabled(side: Side, directory: Path) -> tuple:
    model = side.adapted()
    with model.disable_adapter():
        disabled = logits(model, token_ids())
    return disabled, model


def rescaled(side: Side, directory: Path) -> tuple:
    model = side.adapted()
    with helpers.rescale_adapter_scale(model, 0.3):
        rescaled = logits(model, token_ids())
    return rescaled, model


def without_casting(side: Side, directory: Path) -> tuple:
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
    """The combination's deltas, since the factors of an SVD are unique only up to their sign."""
    model = side.adapted(side.config(**(first or {})), side.config(lora_alpha=8, **(second or {})))
    # small, because nearly equal singular values amplify rounding
    set_factors(model, std=0.05)
    # `density` 1 drops nothing, so random choices don't matter
    density = None if kind in ("svd", "linear", "cat") else 1.0 if kind.startswith("dare") else 0.6
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "new", combination_type=kind, density=density)
    model.set_adapter("new")
    if isinstance(side, Stock):
        for layer in _layers(model):
            # PEFT applies the rsLoRA scaling a second time, so its result is sqrt(r) times the sum
            layer.scaling["new"] = 1.0
    reached = [(path, layer) for path, layer in _named_layers(model) if "new" in layer.lora_A]
    deltas = per_expert((f"{path}.", layer.get_delta_weight("new")) for path, layer in reached)
    return logits(model, token_ids()), deltas


def combined_all(side: Side, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {kind: combined(kind, side, directory) for kind in COMBINATIONS}
    for kind in ("svd", "cat"):
        found[f"{kind}, ranks"] = combined(kind, side, directory, {}, {"r": 2})
        found[f"{kind}, pattern"] = combined(kind, side, directory, {"rank_pattern": {PATTERN: 6}}, {"r": 2})
        found[f"{kind}, layers"] = combined(kind, side, directory, {}, {"target_modules": side.targets[:1]})
    for kind in ("svd", "linear", "cat", "ties"):
        found[f"{kind}, rslora"] = combined(kind, side, directory, {"use_rslora": True}, {"use_rslora": True})
    return found


def merged(side: Side, directory: Path) -> tuple:
    model = side.adapted(side.config(), side.config(r=2))
    model.merge_adapter(["default", "second"])
    merged = logits(model, token_ids())
    model.unmerge_adapter()
    return merged, model


def merge_and_unload(side: Side, directory: Path) -> dict[str, torch.Tensor]:
    merged = side.adapted(side.config(rank_pattern={PATTERN: 6})).merge_and_unload(safe_merge=True)
    return _base_state(merged.state_dict())


def unload(side: Side, directory: Path) -> dict[str, torch.Tensor]:
    return _base_state(side.adapted().unload().state_dict())


def _base_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removesuffix(".weight"): value for name, value in per_expert(state.items()).items()}


def base_round_trip(side: Side, directory: Path) -> tuple:
    model, base = side.adapted(), side.base()
    got = peft.get_base_model_state_dict(model)
    assert got.keys() == base.state_dict().keys()
    result = peft.set_base_model_state_dict(model, {name: 1.1 * value for name, value in got.items()})
    return _base_state(got), model, list(result.missing_keys), list(result.unexpected_keys)


def state_round_trip(side: Side, directory: Path) -> tuple:
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
    # `gate` is the router: a module trained in full in a model with experts
    model = side.adapted(side.config(modules_to_save=["gate"], rank_pattern={PATTERN: 6}, **options))
    model.save_pretrained(directory / type(side).__name__)
    return directory / type(side).__name__


def loaded(side: Side, directory: Path) -> tuple:
    path = _saved(side, directory)
    found: list[Any] = [per_expert(peft.load_peft_weights(str(path), device="cpu").items())]
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}):
        model = peft.PeftModel.from_pretrained(side.base(), path, torch_device="cpu", **options)
        model.load_adapter(path, "other", torch_device="cpu", **options)
        found.append(model)
    return tuple(found)


def loaded_on_bf16(side: Side, directory: Path) -> tuple:
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


def injected(side: Side, directory: Path) -> tuple:
    first = peft.inject_adapter_in_model(side.config(), side.base())
    set_factors(first)
    state = peft.get_peft_model_state_dict(first)
    again = peft.inject_adapter_in_model(side.config(), side.base(), state_dict=state)
    peft.set_peft_model_state_dict(again, state)
    empty = peft.inject_adapter_in_model(side.config(), side.base(), low_cpu_mem_usage=True)
    return first, again, per_expert((name, str(p.device)) for name, p in empty.named_parameters())


def swapped(side: Side, directory: Path) -> nn.Module:
    model = side.adapted()
    new = {name: 2 * value for name, value in model.state_dict().items() if ".lora_" in name}
    hotswap.hotswap_adapter_from_state_dict(model, new, "default", side.config(lora_alpha=10))
    return model


def mixed_batch(side: Side, directory: Path) -> torch.Tensor:
    model, samples, names = side.adapted(side.config(), side.config(r=2)), token_ids(batch=3), ("second", "default")
    if isinstance(side, Ours) and not isinstance(side, Stock):
        return logits(model, samples, adapter_names=[*names, "__base__"])
    # PEFT does not support mixed adapters in a layer that sees the tokens of all samples at once
    rows = []
    for name, sample in zip(names, samples):
        model.set_adapter(name)
        rows.append(logits(model, sample[None]))
    with model.disable_adapter():
        return torch.cat([*rows, logits(model, samples[-1:])])


def signatures(side: Side, directory: Path) -> tuple:
    model = side.adapted()
    helpers.update_forward_signature(model)
    helpers.update_generate_signature(model)
    helpers.update_signature(model)
    return model, model.generate(token_ids(), max_new_tokens=4, do_sample=False)


def cast(side: Side, directory: Path) -> dict[str, str]:
    model = side.adapted(dtype=torch.float16)
    peft.cast_mixed_precision_params(model, dtype=torch.float16)
    return {name: str(p) for name, p in per_expert((n, p.dtype) for n, p in model.named_parameters()).items()}


def prepared(side: Side, directory: Path) -> nn.Module:
    model = peft.prepare_model_for_kbit_training(side.base(torch.bfloat16), use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, side.config())
    set_factors(model)
    return model


def from_dict(side: Side, directory: Path) -> nn.Module:
    config = peft.get_peft_config(side.config().to_dict())
    model = peft.get_peft_model(side.base(), config)
    set_factors(model)
    return model


def is_peft_model(side: Side, directory: Path) -> bool:
    return helpers.check_if_peft_model(str(_saved(side, directory)))


def optimized(function: Callable, side: Side, directory: Path, **options: Any) -> None:
    model = side.adapted()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = function(model, **options)
    backward(model)
    try:
        optimizer.step()
    finally:
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def padded(side: Side, directory: Path) -> None:
    model = side.adapted()
    before = logits(model, token_ids())
    try:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    finally:
        # hotswapping turns scalings of linear layers into tensors, which multiply in another order
        torch.testing.assert_close(logits(model, token_ids()), before, rtol=1e-5, atol=1e-5)


def hotswapped(side: Side, directory: Path) -> None:
    model, path = side.adapted(side.config(modules_to_save=["gate"])), _saved(side, directory)
    before = logits(model, token_ids())
    try:
        hotswap.hotswap_adapter(model, str(path), "default", torch_device="cpu")
    finally:
        assert torch.equal(logits(model, token_ids()), before)


def transformers_hotswap(side: Side, directory: Path) -> None:
    path, model = str(_saved(side, directory)), side.base()
    model.load_adapter(path, adapter_name="default")
    before = logits(model, token_ids())
    try:
        model.load_adapter(path, adapter_name="default", hotswap=True)
    finally:
        assert torch.equal(logits(model, token_ids()), before)


def xlora(side: Side, directory: Path) -> None:
    path, base = str(_saved(side, directory)), side.base()
    base.config.use_cache = False
    peft.get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters={"0": path}))


def arrow(side: Side, directory: Path) -> None:
    path = str(_saved(side, directory))
    peft.create_arrow_model(side.base(), [path, path], peft.ArrowConfig(top_k=1))
