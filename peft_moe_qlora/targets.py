"""Which modules a configuration asks for: experts by their own and by older names, and linear layers."""

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

# names that a projection, or half of a fused one, had when each expert was a module of its own
GATE_NAMES = ("gate_proj", "w1")
UP_NAMES = ("up_proj", "w3")
DOWN_NAMES = ("down_proj", "w2")

UNTIE = (
    "Give them weights of their own before the adapter is loaded: model.lm_head.weight = "
    "torch.nn.Parameter(model.lm_head.weight.clone()) and model.config.tie_word_embeddings = False; to merge on disk, "
    "save that and merge into it."
)
"""What to do where embeddings and head are tied."""

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that PEFT adds to `modules_to_save` by itself, by task; a model has one of them."""

_ROUTER_NAMES = re.compile(r"(gate|router|wg|.*_router|.*router_proj)")


def parents(path: str) -> Iterator[str]:
    """The paths above a path, the nearest first."""
    while path := path.rpartition(".")[0]:
        yield path


def check_not_shared(model: nn.Module) -> None:
    """Refuses experts that stand in several places of the model: PEFT would adapt the first of them only."""
    first: dict[nn.Module, str] = {}
    for path, module in find_experts(model):
        if module in first:
            raise ValueError(
                f"{path} and {first[module]} are one experts module, which can't be adapted in two places. Give each "
                "layer a module of its own; they may share parameters."
            )
        first[module] = path


def expert_layouts(model: nn.Module) -> dict[str, ExpertsLayout]:
    """Path -> layout of every routed experts module, converted or not."""
    return {
        path: module.layout if isinstance(module, QuantizedExperts) else read_layout(module, path)
        for path, module in find_experts(model)
    }


def module_names(model: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> list[str]:
    """Paths of all modules but the parts of experts and of adapters."""
    return [
        name
        for name, _ in model.named_modules()
        if name and ".base_layer" not in name and not any(parent in layouts for parent in parents(name))
    ]


def is_all_linear(config: LoraConfig) -> bool:
    """Whether a config asks for "all-linear", which has a meaning for a model only."""
    names = config.target_modules
    return isinstance(names, str) and names.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def resolve_targets(config: MoeQLoraConfig, model: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> None:
    """Rewrites `target_modules` such that PEFT's own matching finds the linear layers and the stacks that are meant.

    "all-linear" is written out as PEFT's linear layers without heads, routers and what LoRA can't train, and all
    experts. Names of experts modules, and names from when each expert was a module, become paths of projections.

    Args:
        config: changed in place; what PEFT finds by itself stays as it is.
        model: with its experts converted or not.
        layouts: path -> layout of every experts module.

    Raises:
        ValueError: the names single out half of a fused stack, or some of the experts.
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
    # short names where they reach the same
    for paths in ({".".join(name.split(".")[-2:]) for name in wanted}, wanted):
        config.target_modules = others | paths
        if _reached(config, layouts) == wanted:
            return


def _names(
    layouts: Mapping[str, ExpertsLayout], projections: Callable[[str, ExpertsLayout], Iterable[str]]
) -> list[str]:
    return [f"{path}.{name}" for path, layout in layouts.items() for name in projections(path, layout)]


def reached_stacks(config: MoeQLoraConfig, layouts: Mapping[str, ExpertsLayout]) -> list[str]:
    """Paths of the projections that PEFT finds by a config whose targets are resolved."""
    stacks = _names(layouts, lambda _, layout: layout.projections)
    return [name for name in stacks if check_target_module_exists(config, name)]


def _reached(config: MoeQLoraConfig, layouts: Mapping[str, ExpertsLayout]) -> set[str]:
    """The projections that PEFT finds, and experts modules, which it couldn't adapt."""
    modules = (path for path in layouts if check_target_module_exists(config, path))
    return {*modules, *reached_stacks(config, layouts)}


def _with_names(option: Iterable[str] | str | None, names: list[str]) -> list[str] | str:
    if isinstance(option, str):
        return "|".join([f"({option})", *map(re.escape, names)])
    return [*(option or ()), *names]


def targeted_projections(config: MoeQLoraConfig, path: str, layout: ExpertsLayout) -> tuple[str, ...]:
    """The projections of an experts module that a configuration adapts, in the order of the forward.

    Raises:
        ValueError: the names single out half of a fused stack, or some of the experts.
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
    """The projections of an experts module that `exclude_modules` names."""
    if is_excluded(config, path):
        return set(layout.projections)
    return _matching_projections(config, "exclude_modules", partial(is_excluded, config), path, layout)


def _matching_projections(
    config: MoeQLoraConfig, option: str, matches: Callable[[str], bool], path: str, layout: ExpertsLayout
) -> set[str]:
    """The projections that an option names, by their names or by those of a time when experts were linear layers."""
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
                f"{path}: {option} names {names[0]} of some experts only, but all {layout.num_experts} are one stack "
                "here. Name all of them, or the stack."
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
            f"{path}: {option} names {'the up projection' if up else 'the gate'} alone, but gate and up projection "
            "are one fused stack here. Name both, or 'gate_up_proj'."
        )
    return found | {layout.up_name} if up else found


def is_excluded(config: MoeQLoraConfig, path: str) -> bool:
    """Whether `exclude_modules` names a path."""
    excluded = config.exclude_modules
    if not excluded:
        return False
    if isinstance(excluded, str):
        return re.fullmatch(excluded, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in excluded)


def check_targets(config: MoeQLoraConfig, module_names: list[str], layouts: Mapping[str, ExpertsLayout]) -> None:
    """Refuses names that reach nothing, and modules to be trained in full that can't be.

    Args:
        config: the configuration.
        module_names: paths of all modules.
        layouts: path -> layout of every experts module.

    Raises:
        ValueError: names the entries at fault and the experts modules there are.
    """
    experts = f"Experts modules here: {_shorten(list(layouts))}; 'experts' names them all."
    unmatched = [] if is_all_linear(config) else unmatched_names(config, module_names, layouts)
    if unmatched or not config.target_modules:
        raise ValueError(f"target_modules={unmatched} match no module. Correct or remove them. {experts}")
    _check_layers(config, module_names)

    def is_module(name: str) -> bool:
        return any(key == name or key.endswith(f".{name}") for key in module_names)

    for name in config.modules_to_save or ():
        if not is_module(name) and not may_be_absent(name, config, is_module):
            raise ValueError(
                f"modules_to_save names {name!r}, which is not a module of the model. Correct or remove it."
            )
        for path in layouts:
            if re.match(rf"(^|.*\.){name}($|\..*)", path):
                raise ValueError(
                    f"modules_to_save names {name!r}, which includes the experts {path}; they can't be trained in "
                    "full. Take it out; to train a router, name the router alone."
                )


def check_matched_modules(config: MoeQLoraConfig, model: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> None:
    """Refuses what PEFT would refuse too, but in the middle of the injection.

    Raises:
        ValueError: `target_modules` reaches a router that is no linear layer, or a module without a weight matrix, or
            `modules_to_save` a linear layer that is stored in a format.
    """
    for name, module in model.named_modules():
        if any(name == one or name.endswith(f".{one}") for one in config.modules_to_save or ()):
            _check_in_floating_point(name, module)
        if not name or name in layouts or not check_target_module_exists(config, name):
            continue
        if not isinstance(module, (nn.Linear, BaseTunerLayer)) and is_router(name, module, layouts):
            raise ValueError(
                f"target_modules reaches the router {name}, a {type(module).__name__}, which LoRA can't adapt. Take "
                f"it out, or train it in full with modules_to_save=[{name.rpartition('.')[2]!r}]."
            )
        if isinstance(module, BaseTunerLayer) or hasattr(module, "in_features"):
            continue
        if all(parameter is None or parameter.dim() < 2 for parameter in module._parameters.values()):
            raise ValueError(
                f"target_modules reaches {name}, a {type(module).__name__}, which has no weight matrix of its own for "
                "LoRA to adapt. Name the linear layers, inside it or elsewhere."
            )


def _check_in_floating_point(path: str, module: nn.Module) -> None:
    for name, layer in module.named_modules(prefix=path):
        if isinstance(layer, QuantizedLinear):
            raise ValueError(
                f"modules_to_save reaches {name}, a linear layer that is stored as {layer.storage}, which can't be "
                "trained in full. Name it in target_modules, or dequantize the model first."
            )


def may_be_absent(name: str, config: LoraConfig, exists: Callable[[str], bool]) -> bool:
    """Whether an entry of `modules_to_save` is one of PEFT's for the task, and another of these is there."""
    heads = _HEADS.get(config.task_type, ())
    return name in heads and any(map(exists, heads))


def _check_layers(config: MoeQLoraConfig, module_names: list[str]) -> None:
    wanted = config.layers_to_transform
    wanted = {wanted} if isinstance(wanted, int) else set(wanted or ())
    # as PEFT counts layers: the first number of a path
    found = {int(number) for key in module_names for number in re.findall(r"\.(\d+)(?:\.|$)", key)[:1]}
    if wanted - found:
        raise ValueError(
            f"layers_to_transform names the layers {sorted(wanted - found)}, which the model doesn't have; it has "
            f"{len(found)}, from {min(found)} to {max(found)}."
        )


def _shorten(paths: list[str], most: int = 3) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def unmatched_names(
    config: MoeQLoraConfig, module_names: list[str], layouts: Mapping[str, ExpertsLayout]
) -> list[str]:
    """The entries of `target_modules` that name neither a module nor experts.

    Args:
        config: its layer and exclusion options don't count here.
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
    """Refuses patterns of ranks and alphas that mean experts modules, and those of which the order matters.

    PEFT sorts patterns when it saves, and the first that matches counts.

    Args:
        config: the configuration.
        adapted: paths of linear layers and projections that get factors.
        layouts: path -> layout of every experts module.

    Raises:
        ValueError: names the pattern, or two patterns and what both match.
    """
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option) or {}
        for pattern in patterns:
            if any(_matches(pattern, path) for path in layouts) and not any(_matches(pattern, key) for key in adapted):
                raise ValueError(
                    f"{option} names experts modules by {pattern!r}, but ranks belong to their projections. Name "
                    f"these: {pattern + '.gate_up_proj'!r}, {pattern + '.down_proj'!r}; or set expert_r for all."
                )
        for key in adapted if len(patterns) > 1 else ():
            matching = [pattern for pattern in patterns if _matches(pattern, key)]
            if matching and patterns[matching[0]] != patterns[min(matching)]:
                raise ValueError(
                    f"{option}: {matching[0]!r} and {min(matching)!r} both match {key}. The adapter file has them "
                    "sorted, so that the second would count after loading. Make them exclude each other."
                )


def _matches(pattern: str, key: str) -> bool:
    # get_pattern_key gives the key back where nothing matches, and where the pattern is the key
    return pattern == key or get_pattern_key([pattern], key) != key


def is_router(name: str, module: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> bool:
    """Whether a linear layer is, or belongs to, the router of one of the experts modules.

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
            continue  # where experts hang on the layer itself, attention and its gates are beside them
        if any(_ROUTER_NAMES.fullmatch(part) for part in parts):
            return True
        if len(parts) == 1 and getattr(module, "out_features", None) == layout.num_experts:
            return True
    return False


def trained_expert_biases(model: nn.Module, bias: str) -> Iterator[tuple[str, nn.Parameter]]:
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
