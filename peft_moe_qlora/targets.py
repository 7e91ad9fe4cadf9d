"""Resolves the modules that a configuration targets: linear layers, and experts by current or per-expert names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn

from .config import ALL_EXPERTS, MoeQLoraConfig
from .experts import ExpertsLayout, QuantizedExperts, bias_name, find_experts, read_layout
from .layer import ExpertsLora
from .quantized_linear import QuantizedLinear
from .unadaptable import why_unadaptable

# names of the projections in models with one module per expert
GATE_NAMES = ("gate_proj", "w1")
UP_NAMES = ("up_proj", "w3")
DOWN_NAMES = ("down_proj", "w2")

UNTIE = (
    "Untie them before the adapter is loaded: model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone()) "
    "and model.config.tie_word_embeddings = False. To merge on disk, save the untied model and merge into it."
)
"""Remedy for tied embeddings and head."""

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task type -> names of heads that PEFT adds to `modules_to_save`; a model has one of them."""

_ROUTER_NAMES = re.compile(r"(gate|router|wg|.*_router|.*router_proj)")


def parents(path: str) -> Iterator[str]:
    """Paths of the parents of a module, nearest first."""
    while path := path.rpartition(".")[0]:
        yield path


def check_not_shared(model: nn.Module) -> None:
    """Rejects experts modules shared by several paths, since PEFT would adapt only the first path."""
    first: dict[nn.Module, str] = {}
    for path, module in find_experts(model):
        if module in first:
            raise ValueError(
                f"{path} and {first[module]} are the same experts module. Adapting one module at two paths is not "
                "supported. Use a separate module for each layer; the modules may share parameters."
            )
        first[module] = path


def expert_layouts(model: nn.Module) -> dict[str, ExpertsLayout]:
    """Path -> layout of all routed experts modules, converted or not."""
    return {
        path: module.layout if isinstance(module, QuantizedExperts) else read_layout(module, path)
        for path, module in find_experts(model)
    }


def module_names(model: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> list[str]:
    """Paths of all modules except those inside of experts and adapters."""
    return [
        name
        for name, _ in model.named_modules()
        if name and ".base_layer" not in name and not any(parent in layouts for parent in parents(name))
    ]


def is_all_linear(config: LoraConfig) -> bool:
    """Whether a config has `target_modules="all-linear"`, which depends on the model."""
    names = config.target_modules
    return isinstance(names, str) and names.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def resolve_targets(config: MoeQLoraConfig, model: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> None:
    """Rewrites `target_modules` such that PEFT's matching finds the targeted linear layers and stacks.

    "all-linear" becomes the list of PEFT's linear layers and all experts, without heads, routers and layers that LoRA
    cannot train. Names of experts modules and per-expert names become paths of projections.

    Args:
        config: changed in place; names that PEFT matches as intended are kept.
        model: the model, with experts converted or not.
        layouts: path -> layout of every experts module.

    Raises:
        ValueError: the names match half of a fused stack, or only some of the experts.
    """
    if is_all_linear(config):
        _maybe_include_all_linear_layers(config, model)
        heads = _HEADS.get(config.task_type, ())
        left_out = {
            name
            for name in config.target_modules
            if name in heads or is_router(name, model.get_submodule(name), layouts) or why_unadaptable(name, model)
        }
        config.target_modules = (config.target_modules - left_out) | {ALL_EXPERTS}
    excluded = _names(layouts, partial(_excluded_projections, config))
    if unknown := [name for name in excluded if not is_excluded(config, name)]:
        config.exclude_modules = _with_names(config.exclude_modules, unknown)
    wanted = set(_names(layouts, partial(targeted_projections, config)))
    if _reached(config, layouts) == wanted:
        return
    names = [name for name in module_names(model, layouts) if name not in layouts]
    if isinstance(config.target_modules, str):
        others = {name for name in names if check_target_module_exists(config, name)}
    else:
        others = set(config.target_modules) & {suffix for name in names for suffix in _suffixes(name)}
    # use short names if they match the same projections
    for paths in ({".".join(name.split(".")[-2:]) for name in wanted}, wanted):
        config.target_modules = others | paths
        if _reached(config, layouts) == wanted:
            return


def _names(
    layouts: Mapping[str, ExpertsLayout], projections: Callable[[str, ExpertsLayout], Iterable[str]]
) -> list[str]:
    return [f"{path}.{name}" for path, layout in layouts.items() for name in projections(path, layout)]


def reached_stacks(config: MoeQLoraConfig, layouts: Mapping[str, ExpertsLayout]) -> list[str]:
    """Paths of the projections that PEFT matches for a config with resolved targets."""
    stacks = _names(layouts, lambda _, layout: layout.projections)
    return [name for name in stacks if check_target_module_exists(config, name)]


def _reached(config: MoeQLoraConfig, layouts: Mapping[str, ExpertsLayout]) -> set[str]:
    """Projections that PEFT matches, and experts modules, which it could not adapt."""
    modules = (path for path in layouts if check_target_module_exists(config, path))
    return {*modules, *reached_stacks(config, layouts)}


def _with_names(option: Iterable[str] | str | None, names: list[str]) -> list[str] | str:
    if isinstance(option, str):
        return "|".join([f"({option})", *map(re.escape, names)])
    return [*(option or ()), *names]


def targeted_projections(config: MoeQLoraConfig, path: str, layout: ExpertsLayout) -> tuple[str, ...]:
    """Projections of an experts module that a configuration adapts, in the order of the forward.

    Raises:
        ValueError: the names match half of a fused stack, or only some of the experts.
    """

    def is_targeted(key: str) -> bool:
        return bool(check_target_module_exists(config, key))

    if is_targeted(path) or is_targeted(f"{path}.{ALL_EXPERTS}"):
        named = set(layout.projections)
    else:
        named = _matching_projections(config, "target_modules", is_targeted, path, layout)
    named -= _excluded_projections(config, path, layout)
    return tuple(name for name in layout.projections if name in named)


def _excluded_projections(config: MoeQLoraConfig, path: str, layout: ExpertsLayout) -> set[str]:
    """Projections of an experts module that `exclude_modules` matches."""
    if is_excluded(config, path):
        return set(layout.projections)
    return _matching_projections(config, "exclude_modules", partial(is_excluded, config), path, layout)


def _matching_projections(
    config: MoeQLoraConfig, option: str, matches: Callable[[str], bool], path: str, layout: ExpertsLayout
) -> set[str]:
    """Projections that an option matches by their current or by per-expert names."""
    value = getattr(config, option) or ()
    counts_experts = isinstance(value, str) or any(re.search(r"(^|\.)\d+\.", name) for name in value)

    def matches_old(names: tuple[str, ...]) -> bool:
        if any(matches(f"{path}.{name}") for name in names):
            return True
        if not counts_experts:
            return False
        # experts.0.up_proj, experts.1.up_proj, ...
        hits = [any(matches(f"{path}.{e}.{name}") for name in names) for e in range(layout.num_experts)]
        if any(hits) and not all(hits):
            raise ValueError(
                f"{path}: {option} contains {names[0]} of some experts only, but the weights of all "
                f"{layout.num_experts} experts are one stack. Name {names[0]} of all experts, or the stack."
            )
        return any(hits)

    found = {name for name in layout.projections if matches(f"{path}.{name}")}
    if "down_proj" not in found and matches_old(DOWN_NAMES):
        found.add("down_proj")
    if layout.up_name in found:
        return found
    up = matches_old(UP_NAMES)
    if layout.has_gate and matches_old(GATE_NAMES) != up:
        raise ValueError(
            f"{path}: {option} contains {'the up projection' if up else 'the gate projection'} alone, but gate and up "
            "projections are one fused stack. Name both, or 'gate_up_proj'."
        )
    return found | {layout.up_name} if up else found


def is_excluded(config: MoeQLoraConfig, path: str) -> bool:
    """Whether `exclude_modules` matches a path."""
    excluded = config.exclude_modules
    if not excluded:
        return False
    if isinstance(excluded, str):
        return re.fullmatch(excluded, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in excluded)


def check_targets(config: MoeQLoraConfig, module_names: list[str], layouts: Mapping[str, ExpertsLayout]) -> None:
    """Rejects names that match nothing, and entries of `modules_to_save` that are not supported.

    Args:
        config: the configuration.
        module_names: paths of all modules.
        layouts: path -> layout of every experts module.

    Raises:
        ValueError: the error names the invalid entries and the experts modules of the model.
    """
    experts = f"Experts modules of this model: {_shorten(list(layouts))}; 'experts' matches all of them."
    unmatched = [] if is_all_linear(config) else unmatched_names(config, module_names, layouts)
    if unmatched or not config.target_modules:
        raise ValueError(f"target_modules={unmatched} match no module of the model. Correct or remove them. {experts}")
    _check_layers(config, module_names)

    def is_module(name: str) -> bool:
        return any(key == name or key.endswith(f".{name}") for key in module_names)

    for name in config.modules_to_save or ():
        if not is_module(name) and not may_be_absent(name, config, is_module):
            raise ValueError(
                f"modules_to_save contains {name!r}, which is not a module of the model. Correct or remove it."
            )
        for path in layouts:
            if re.match(rf"(^|.*\.){name}($|\..*)", path):
                raise ValueError(
                    f"modules_to_save contains {name!r}, which includes the experts {path}. Training experts in full "
                    f"is not supported. Remove {name!r}; to train a router, name only the router."
                )


def check_matched_modules(config: MoeQLoraConfig, model: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> None:
    """Rejects modules that PEFT would reject too, but only in the middle of the injection.

    Raises:
        ValueError: `target_modules` matches a router that is not a linear layer or a module without a weight matrix,
            or `modules_to_save` matches a quantized linear layer.
    """
    for name, module in model.named_modules():
        if any(name == one or name.endswith(f".{one}") for one in config.modules_to_save or ()):
            _check_in_floating_point(name, module)
        if not name or name in layouts or not check_target_module_exists(config, name):
            continue
        if not isinstance(module, (nn.Linear, BaseTunerLayer)) and is_router(name, module, layouts):
            raise ValueError(
                f"target_modules matches the router {name} of type {type(module).__name__}, which LoRA does not "
                f"support. Remove it, or train it in full with modules_to_save=[{name.rpartition('.')[2]!r}]."
            )
        if isinstance(module, BaseTunerLayer) or hasattr(module, "in_features"):
            continue
        if all(parameter is None or parameter.dim() < 2 for parameter in module._parameters.values()):
            raise ValueError(
                f"target_modules matches {name} of type {type(module).__name__}, which has no weight matrix of its "
                "own. Name linear layers instead."
            )


def _check_in_floating_point(path: str, module: nn.Module) -> None:
    for name, layer in module.named_modules(prefix=path):
        if isinstance(layer, QuantizedLinear):
            raise ValueError(
                f"modules_to_save matches {name}, a linear layer stored as {layer.storage}, which cannot be trained "
                "in full. Name it in target_modules, or dequantize the model first."
            )


def may_be_absent(name: str, config: LoraConfig, exists: Callable[[str], bool]) -> bool:
    """Whether an entry of `modules_to_save` is a head that PEFT adds for the task, and the model has another one."""
    heads = _HEADS.get(config.task_type, ())
    return name in heads and any(map(exists, heads))


def _check_layers(config: MoeQLoraConfig, module_names: list[str]) -> None:
    wanted = config.layers_to_transform
    wanted = {wanted} if isinstance(wanted, int) else set(wanted or ())
    # like PEFT, take the first number in a path as the layer index
    found = {int(number) for key in module_names for number in re.findall(r"\.(\d+)(?:\.|$)", key)[:1]}
    if wanted - found:
        raise ValueError(
            f"layers_to_transform contains the layers {sorted(wanted - found)}, which the model does not have. It has "
            f"{len(found)} layers, from {min(found)} to {max(found)}."
        )


def _shorten(paths: list[str], most: int = 3) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def unmatched_names(
    config: MoeQLoraConfig, module_names: list[str], layouts: Mapping[str, ExpertsLayout]
) -> list[str]:
    """Entries of `target_modules` that match neither a module nor experts.

    Args:
        config: the configuration; options for layers and exclusions are ignored.
        module_names: paths of all modules.
        layouts: path -> layout of every experts module.
    """
    names = config.target_modules
    keys = [*module_names, *(key for path, layout in layouts.items() for key in _keys_of_experts(path, layout))]
    if isinstance(names, str):
        pattern = re.compile(names)
        return [] if any(pattern.fullmatch(key) for key in keys) else [names]
    suffixes = {suffix for key in keys for suffix in _suffixes(key)}
    return sorted(name for name in names if name not in suffixes)


def _keys_of_experts(path: str, layout: ExpertsLayout) -> list[str]:
    up_names = GATE_NAMES + UP_NAMES if layout.has_gate else UP_NAMES
    old_names = [*up_names, *DOWN_NAMES]
    return [
        f"{path}.{ALL_EXPERTS}",
        *(f"{path}.{name}" for name in (*layout.projections, *old_names)),
        *(f"{path}.{expert}.{name}" for expert in range(layout.num_experts) for name in old_names),
    ]


def _suffixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def check_patterns(config: MoeQLoraConfig, adapted: list[str], layouts: Mapping[str, ExpertsLayout]) -> None:
    """Rejects rank and alpha patterns that match experts modules, and patterns whose order matters.

    PEFT applies the first pattern that matches, and sorts patterns when it saves an adapter.

    Args:
        config: the configuration.
        adapted: paths of linear layers and projections that get factors.
        layouts: path -> layout of every experts module.

    Raises:
        ValueError: the error names the pattern, or two patterns and the module that both match.
    """
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option) or {}
        for pattern in patterns:
            if any(_matches(pattern, path) for path in layouts) and not any(_matches(pattern, key) for key in adapted):
                raise ValueError(
                    f"{option} matches experts modules by {pattern!r}, but ranks are set for their projections. Use "
                    f"{pattern + '.gate_up_proj'!r} and {pattern + '.down_proj'!r}, or set expert_r for all experts."
                )
        for key in adapted if len(patterns) > 1 else ():
            matching = [pattern for pattern in patterns if _matches(pattern, key)]
            if matching and patterns[matching[0]] != patterns[min(matching)]:
                raise ValueError(
                    f"{option}: {matching[0]!r} and {min(matching)!r} both match {key}. Patterns are sorted when the "
                    "adapter is saved, so the second would apply after loading. Change the patterns so that only one "
                    "matches."
                )


def _matches(pattern: str, key: str) -> bool:
    # get_pattern_key returns the key if nothing matches, and if the pattern equals the key
    return pattern == key or get_pattern_key([pattern], key) != key


def is_router(name: str, module: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> bool:
    """Whether a linear layer is a router of one of the experts modules, or a part of it.

    Args:
        name: path of the linear layer.
        module: the layer.
        layouts: path -> layout of every experts module of the model.
    """
    for path, layout in layouts.items():
        block = path.rpartition(".")[0] + "."
        if not name.startswith(block) or name.startswith(path + "."):
            continue
        parts = name.removeprefix(block).split(".")
        if any("attn" in part or "attention" in part for part in parts):
            continue  # attention and its gates are siblings if the experts are a child of the decoder layer
        if any(_ROUTER_NAMES.fullmatch(part) for part in parts):
            return True
        if len(parts) == 1 and getattr(module, "out_features", None) == layout.num_experts:
            return True
    return False


def trained_expert_biases(model: nn.Module, bias: str) -> Iterator[tuple[str, nn.Parameter]]:
    """`(name, parameter)` of the experts' biases that are trained with the given `bias` option."""
    if bias == "none":
        return
    adapted = {id(layer.get_base_layer()) for layer in model.modules() if isinstance(layer, ExpertsLora)}
    for path, experts in model.named_modules():
        if not isinstance(experts, QuantizedExperts) or not experts.layout.has_bias:
            continue
        for projection in experts.layout.projections:
            if bias == "all" or id(experts.stack(projection)) in adapted:
                yield f"{path}.{bias_name(projection)}", experts.projection_bias(projection)
