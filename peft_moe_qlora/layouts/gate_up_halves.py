"""Gate and up projection as two halves, as in other tools, and as the one fused stack of the model."""

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
    """The LoRA factors of a stack or of half of one, whose delta is `scaling * B[e] @ A[e]`.

    Args:
        A: `(E, r, in)`.
        B: `(E, out, r)`.
        alpha: the alpha that results in this scaling at this rank.
    """

    A: torch.Tensor
    B: torch.Tensor
    alpha: float

    @property
    def r(self) -> int:
        return self.A.shape[1]


def part_names(layout: ExpertsLayout) -> dict[str, tuple[str, ...]]:
    """`"gate"`, `"up"`, `"down"` -> possible names in a layer; `"gate"` is absent if there is no gate."""
    if layout.has_gate:
        return _PART_NAMES
    return {"up": ("up_proj",), "down": DOWN_NAMES}


def names_of_parts(base: BaseModel, path: str) -> dict[str, tuple[int, str]]:
    """Every current or former name of the experts' linear layers in checkpoint and model -> expert, part."""
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
    """The paths of an experts module in the model and in the checkpoint."""
    return {name.rpartition(".")[0].rpartition(".")[0] for name in names_of_parts(base, path)} | {path}


def join_parts(foreign: ForeignAdapter, path: str, parts: dict[str, Part]) -> list[ExpertFactors]:
    """The factors of a module's stacks.

    Gate and up projection with the same A keep their rank. Otherwise the rank of the stack is the sum of both ranks,
    and B is block-diagonal, which results in the same delta.

    Args:
        foreign: the adapter being read.
        path: path of the experts module.
        parts: `"gate_up"`, or `"gate"` and `"up"`, or only `"up"` if there is no gate; `"down"`.

    Raises:
        ValueError: half of a fused stack is missing or duplicate, does not fit the base, or has another scaling than
            the other half.
    """
    layout = foreign.base.layouts[path]
    found = []
    if layout.has_gate and ("gate" in parts or "up" in parts):
        if "gate_up" in parts or not parts.keys() >= {"gate", "up"}:
            raise ValueError(
                f"{foreign.file} contains factors of {sorted(parts)} of {path}, where gate and up projection are one "
                "fused stack. Expected factors of either both halves or the whole stack."
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
            f"{foreign.file}: gate and up projection of {path} have scalings {scaling} and "
            f"{foreign.scaling(up.r, up.alpha)}, but are one fused stack here, which has one scaling. Multiply lora_B "
            "of one of them by the ratio of the scalings, and use the same alpha for both."
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
    """`(E, 2 * I, r)` with the gate's rows first, in the row order of the model class."""
    if layout.is_concatenated:
        return B
    return torch.stack(B.chunk(2, dim=1), dim=2).flatten(1, 2)


def gate_and_up(B: torch.Tensor, layout: ExpertsLayout) -> list[torch.Tensor]:
    """Splits the B of `gate_up_proj`, `(E, 2 * I, r)`, into the rows of gate and up, `(E, I, r)` each."""
    return list(B.chunk(2, dim=1)) if layout.is_concatenated else [B[:, ::2], B[:, 1::2]]


def check_layers(
    foreign: ForeignAdapter, found: dict[str, dict[str, Part]], is_targeted: Callable[[str, str], bool]
) -> None:
    """Rejects a file that has a part in some layers and lacks it in others of the same kind.

    Args:
        foreign: the adapter being read.
        found: path -> parts.
        is_targeted: path, part -> whether the config targets it.

    Raises:
        ValueError: a part is missing; the error names the first.
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
    """Renames non-expert tensors to the model's names, which may differ from the checkpoint's.

    Args:
        foreign: the adapter being read.
        non_expert: key -> tensor.
        is_targeted: name in the model or in the checkpoint -> whether the config targets it.

    Returns:
        Key -> tensor, and name of an adapted layer in the model -> its name in the file.

    Raises:
        ValueError: factors of a layer are missing although others of its kind have them, or exist under two names.
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
    """Renames LoRA tensors to the model's names, which may differ from the checkpoint's.

    Args:
        foreign: the adapter being read.
        tensors: key -> tensor; tensors of other layers than linear ones keep their keys.

    Returns:
        Key -> tensor, and name of an adapted layer in the model -> its name in the file.

    Raises:
        ValueError: a layer has factors under two names.
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
                f"{foreign.file}: {name} and {names_in_file[own]} are names of the same layer. Remove one of them."
            )
        renamed[f"{own}{lora}{end}"] = tensor
    return renamed, names_in_file
