"""Gate and up projection as two halves, as other tools have them, and as the one stack that they are in the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch

from ..experts import ExpertsLayout
from ..targets import DOWN_NAMES, GATE_NAMES, UP_NAMES
from .adapter_file import ExpertFactors
from .base_model import BaseModel
from .foreign import ForeignAdapter, kind
from .non_expert import adapted_layers

_PART_NAMES = {"gate": GATE_NAMES, "up": UP_NAMES, "down": DOWN_NAMES}


@dataclass(frozen=True)
class Part:
    """What an adapter adds to a stack or to half of one: `scaling * B[e] @ A[e]`.

    Args:
        A: `(E, r, in)`.
        B: `(E, out, r)`.
        alpha: that gives the scaling at this rank.
    """

    A: torch.Tensor
    B: torch.Tensor
    alpha: float

    @property
    def r(self) -> int:
        return self.A.shape[1]


def part_names(layout: ExpertsLayout) -> dict[str, tuple[str, ...]]:
    """`"gate"`, `"up"`, `"down"` -> what a layer may call it; without a gate there is no `"gate"`."""
    if layout.has_gate:
        return _PART_NAMES
    return {"up": ("up_proj",), "down": DOWN_NAMES}


def names_of_parts(base: BaseModel, path: str) -> dict[str, tuple[int, str]]:
    """Name of every expert's linear layers, as checkpoint and model have or had them -> expert, part."""
    layout = base.layouts[path]
    found = {}
    containers = {path}
    for projection in layout.projections:
        parts = ("gate", "up") if projection == "gate_up_proj" else (projection.removesuffix("_proj"),)
        for number, name in enumerate(base.names_of_experts(path, projection)):
            expert, part = divmod(number, len(parts))
            found[name] = (expert, parts[part])
            container, _, index = name.rpartition(".")[0].rpartition(".")
            if index == str(expert):
                containers.add(container)
    for container in containers:
        for part, names in part_names(layout).items():
            for expert in range(layout.num_experts):
                found |= {f"{container}.{expert}.{name}": (expert, part) for name in names}
    return found


def containers_of(base: BaseModel, path: str) -> set[str]:
    """The paths that stand for an experts module in the model and in the checkpoint."""
    return {name.rpartition(".")[0].rpartition(".")[0] for name in names_of_parts(base, path)} | {path}


def join_parts(foreign: ForeignAdapter, path: str, parts: dict[str, Part]) -> list[ExpertFactors]:
    """The factors of a module's stacks.

    Gate and up projection with the same A keep their rank; else the stack has both ranks together, and zeros in B
    where one has nothing to do with the other, which is the same sum.

    Args:
        foreign: what is read.
        path: of the experts module.
        parts: `"gate_up"`, or `"gate"` and `"up"`, or `"up"` alone where there is no gate; `"down"`.

    Raises:
        ValueError: half of a fused stack is missing or there twice, doesn't fit the base, or has another scaling than
            the other half.
    """
    layout = foreign.base.layouts[path]
    found = []
    if layout.has_gate and ("gate" in parts or "up" in parts):
        if "gate_up" in parts or not parts.keys() >= {"gate", "up"}:
            raise ValueError(
                f"{foreign.file} has factors of {sorted(parts)} of {path}; gate and up projection are one stack, of "
                "which either both halves or the whole was expected."
            )
        found.append(_fused(foreign, path, parts["gate"], parts["up"]))
    elif layout.up_name.removesuffix("_proj") in parts:
        part = parts[layout.up_name.removesuffix("_proj")]
        found.append(foreign.factors(path, layout.up_name, part.A, part.B, part.alpha))
    if "down" in parts:
        found.append(foreign.factors(path, "down_proj", parts["down"].A, parts["down"].B, parts["down"].alpha))
    return found


def _fused(foreign: ForeignAdapter, path: str, gate: Part, up: Part) -> ExpertFactors:
    layout = foreign.base.layouts[path]
    in_features, out_features = layout.features("gate_up_proj")
    for name, part in (("gate_proj", gate), ("up_proj", up)):
        foreign.check_shapes(f"{path}.{name}", part.A, part.B, layout.num_experts, in_features, out_features // 2)
    scaling = foreign.scaling(gate.r, gate.alpha)
    if scaling != foreign.scaling(up.r, up.alpha):
        raise ValueError(
            f"{foreign.file}: gate and up projection of {path} have the scalings {scaling} and "
            f"{foreign.scaling(up.r, up.alpha)}, but are one stack here, which has one. Multiply the ratio into "
            "lora_B of one, and give both the same alpha."
        )
    is_shared = gate.A.shape == up.A.shape and torch.equal(gate.A, up.A)
    A = gate.A if is_shared else torch.cat([gate.A, up.A], dim=1)
    r = A.shape[1]
    B_gate, B_up = gate.B, up.B
    if not is_shared:
        B_gate = torch.cat([gate.B, gate.B.new_zeros(*gate.B.shape[:2], up.r)], dim=2)
        B_up = torch.cat([up.B.new_zeros(*up.B.shape[:2], gate.r), up.B], dim=2)
    B = with_rows_in_order(torch.cat([B_gate, B_up], dim=1), layout)
    ratio = r / gate.r
    return foreign.factors(
        path, "gate_up_proj", A, B, gate.alpha * (sqrt(ratio) if foreign.config.use_rslora else ratio)
    )


def with_rows_in_order(B: torch.Tensor, layout: ExpertsLayout) -> torch.Tensor:
    """`(E, 2 * I, r)`, the gate's rows first, as the class has its rows."""
    if layout.is_concatenated:
        return B
    return torch.stack(B.chunk(2, dim=1), dim=2).flatten(1, 2)


def gate_and_up(B: torch.Tensor, layout: ExpertsLayout) -> list[torch.Tensor]:
    """The rows of gate and of up, `(E, I, r)` each, of the B of `gate_up_proj`, `(E, 2 I, r)`."""
    return list(B.chunk(2, dim=1)) if layout.is_concatenated else [B[:, ::2], B[:, 1::2]]


def check_layers(
    foreign: ForeignAdapter, found: dict[str, dict[str, Part]], is_targeted: Callable[[str, str], bool]
) -> None:
    """Refuses a file that has a part in some layers and lacks it in others of the same kind.

    Args:
        foreign: what is read.
        found: path -> parts.
        is_targeted: path, part -> whether the config asks for it.

    Raises:
        ValueError: names the first that is missing.
    """
    kinds = {(kind(path), part) for path, parts in found.items() for part in parts}
    expected = [
        f"{path}.{part}_proj"
        for path in foreign.base.layouts
        for part in ("gate_up", "gate", "up", "down")
        if (kind(path), part) in kinds and is_targeted(path, part)
    ]
    foreign.check_complete([f"{path}.{part}_proj" for path, parts in found.items() for part in parts], expected)


def non_expert_by_own_names(
    foreign: ForeignAdapter, non_expert: dict[str, torch.Tensor], is_targeted: Callable[[str], bool]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors beside experts under the model's names, which a checkpoint may have otherwise.

    Args:
        foreign: what is read.
        non_expert: key -> tensor.
        is_targeted: name in the model or in the checkpoint -> whether the config asks for it.

    Returns:
        Key -> tensor, and name of an adapted layer in the model -> its name in the file.

    Raises:
        ValueError: a layer is missing that others of the same kind have, or is there under two names.
    """
    renamed, names_in_file = under_own_names(foreign, non_expert)
    found = adapted_layers(renamed)
    kinds = {kind(name) for name in found}
    expected = []
    for name in foreign.base.layers():
        in_checkpoint = foreign.base.name_of_linear(name)
        if kind(name) in kinds and (is_targeted(name) or (in_checkpoint is not None and is_targeted(in_checkpoint))):
            expected.append(name)
    foreign.check_complete(found, expected)
    return renamed, names_in_file


def under_own_names(
    foreign: ForeignAdapter, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """LoRA's tensors under the model's names, which a checkpoint may have otherwise.

    Args:
        foreign: what is read.
        tensors: key -> tensor; those that aren't of a linear layer keep their keys.

    Returns:
        Key -> tensor, and name of an adapted layer in the model -> its name in the file.

    Raises:
        ValueError: a layer is there under two names.
    """
    layers = foreign.base.layers()
    own_names = {foreign.base.name_of_linear(name): name for name in layers} | {name: name for name in layers}
    renamed, names_in_file = {}, {}
    for key, tensor in tensors.items():
        name, lora, end = key.partition(".lora_")
        if not lora:
            renamed[key] = tensor
            continue
        own = own_names.get(name, name)
        if names_in_file.setdefault(own, name) != name:
            raise ValueError(
                f"{foreign.file}: {name} and {names_in_file[own]} are the same layer. Remove one of them."
            )
        renamed[f"{own}{lora}{end}"] = tensor
    return renamed, names_in_file
