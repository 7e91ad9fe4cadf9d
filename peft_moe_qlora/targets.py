"""Which modules a configuration asks for: experts by their own and by older names, and linear layers."""

from __future__ import annotations

import re

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from .config import ALL_EXPERTS, MoeQLoraConfig
from .experts import ExpertsLayout

# names that a projection, or half of a fused one, had when each expert was a module of its own
_GATE_NAMES = ("gate_proj", "w1")
_UP_NAMES = ("up_proj", "w3")
_DOWN_NAMES = ("down_proj", "w2")

_ROUTER_NAMES = re.compile(r"(gate|router|wg|.*_router|.*router_proj)")


def targeted_projections(config: MoeQLoraConfig, path: str, layout: ExpertsLayout) -> tuple[str, ...]:
    """The projections of an experts module that a configuration adapts, in the order of the forward.

    Raises:
        ValueError: the names single out the gate or the up half of a fused stack.
    """

    def targets(*keys: str) -> bool:
        return any(check_target_module_exists(config, key) for key in keys)

    def targets_names(names: tuple[str, ...]) -> bool:
        # a list or regex of that time may count the experts: experts.0.up_proj
        return targets(*(f"{path}.{name}" for name in names), *(f"{path}.0.{name}" for name in names))

    if is_excluded(config, path):
        return ()
    if targets(path, f"{path}.{ALL_EXPERTS}"):
        named = layout.projections
    else:
        named = tuple(name for name in layout.projections if targets(f"{path}.{name}"))
        if layout.up_name not in named and _targets_up(targets_names, path, layout):
            named = (layout.up_name, *named)
        if "down_proj" not in named and targets_names(_DOWN_NAMES):
            named = (*named, "down_proj")
    if config.target_experts is None:
        return named
    return tuple(name for name in named if name in config.target_experts)


def _targets_up(targets_names, path: str, layout: ExpertsLayout) -> bool:
    if not layout.has_gate:
        return targets_names(_UP_NAMES)
    gate, up = targets_names(_GATE_NAMES), targets_names(_UP_NAMES)
    if gate != up:
        raise ValueError(
            f"{path}: target_modules names {'the gate' if gate else 'the up projection'} alone, but gate and up "
            "projection are one fused stack here. Name both, or 'gate_up_proj'."
        )
    return gate


def is_excluded(config: MoeQLoraConfig, path: str) -> bool:
    """Whether `exclude_modules` takes an experts module out."""
    excluded = config.exclude_modules
    if not excluded:
        return False
    if isinstance(excluded, str):
        return re.fullmatch(excluded, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in excluded)


def resolve_rank_and_alpha(config: MoeQLoraConfig, path: str, projection: str) -> tuple[int, float]:
    """Rank and alpha of one projection: by pattern on the projection, by pattern on the module, else the experts'."""
    return (
        _by_pattern(config.rank_pattern, path, projection, config.resolved_expert_r),
        _by_pattern(config.alpha_pattern, path, projection, config.resolved_expert_alpha),
    )


def _by_pattern(pattern: dict[str, float], path: str, projection: str, default: float):
    for key in (f"{path}.{projection}", path):
        pattern_key = get_pattern_key(pattern.keys(), key)
        if pattern_key in pattern:
            return pattern[pattern_key]
    return default


def check_targets(
    config: MoeQLoraConfig,
    module_names: list[str],
    layouts: dict[str, ExpertsLayout],
    targets: dict[str, tuple[str, ...]],
) -> None:
    """Refuses names that reach nothing, and settles `target_experts` so that the saved config reaches the same.

    Args:
        config: the configuration.
        module_names: paths of all modules.
        layouts: path -> layout of every experts module.
        targets: path -> projections that get factors.

    Raises:
        ValueError: names the entries at fault and the experts modules there are.
    """
    experts = f"Experts modules here: {_shorten(list(layouts))}; 'experts' names them all."
    unmatched = unmatched_names(config, module_names, layouts)
    if unmatched or not config.target_modules:
        raise ValueError(f"target_modules={unmatched} match no module. Correct or remove them. {experts}")
    adapted = {projection for projections in targets.values() for projection in projections}
    if config.target_experts and not adapted:
        raise ValueError(
            f"target_experts={config.target_experts} leaves nothing of the experts to adapt that target_modules="
            f"{config.target_modules} names. Drop one of the two. {experts}"
        )
    if not adapted:
        config.target_experts = []
    for path in layouts:
        for name in config.modules_to_save or ():
            if re.match(rf"(^|.*\.){name}($|\..*)", path):
                raise ValueError(
                    f"modules_to_save names {name!r}, which includes the experts {path}; they can't be trained in "
                    "full. Take it out; to train a router, name the router alone."
                )


def _shorten(paths: list[str], most: int = 3) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def unmatched_names(config: MoeQLoraConfig, module_names: list[str], layouts: dict[str, ExpertsLayout]) -> list[str]:
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
    up_names = _GATE_NAMES + _UP_NAMES if layout.has_gate else _UP_NAMES
    old_names = [*up_names, *_DOWN_NAMES]
    return [
        f"{path}.{ALL_EXPERTS}",
        *(f"{path}.{name}" for name in (*layout.projections, *old_names)),
        *(f"{path}.{expert}.{name}" for expert in range(layout.num_experts) for name in old_names),
    ]


def _suffixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def unmatched_patterns(
    config: MoeQLoraConfig, module_names: list[str], targets: dict[str, tuple[str, ...]]
) -> list[str]:
    """The keys of `rank_pattern` and `alpha_pattern` that match nothing that got an adapter.

    Args:
        config: the configuration.
        module_names: paths of the modules that got one.
        targets: path -> adapted projections of every experts module.
    """
    keys = [*module_names, *(f"{path}.{name}" for path, projections in targets.items() for name in projections)]
    patterns = {*config.rank_pattern, *config.alpha_pattern}
    return sorted(pattern for pattern in patterns if all(get_pattern_key([pattern], key) == key for key in keys))


def is_router(name: str, module: torch.nn.Module, layouts: dict[str, ExpertsLayout]) -> bool:
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
        if any(_ROUTER_NAMES.fullmatch(part) for part in parts):
            return True
        if len(parts) == 1 and getattr(module, "out_features", None) == layout.num_experts:
            return True
    return False
