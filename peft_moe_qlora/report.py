"""Report on storage, adapters and computation path of all experts modules of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate
from torch import nn

from .experts import ALWAYS_ON_CLASSES, UNSUPPORTED_CLASSES, QuantizedExperts, find_experts, read_layout
from .layer import ExpertsLora
from .sharded import whole_shape


@dataclass(frozen=True)
class StackReport:
    """Report on one stack.

    Args:
        path: path of the experts module.
        architecture: class name of the experts.
        projection: name of the stack.
        shape: `(E, rows, columns)` of the 16-bit parameter.
        storage: format or dtype.
        nbytes: stored bytes, including scales.
        dense_nbytes: bytes of the 16-bit parameter.
        ranks: adapter -> rank of its factors.
        num_adapter_parameters: adapter -> number of parameters in both factors.
        trainable: adapters whose factors require gradients.
        merged: adapters merged into the stack.
        merge_error: relative L2 error of the stack against the exact merged weights; None if nothing was merged.
        delta_kept: fraction of the delta that the stack contains; None if nothing was merged.
        merge_notes: notes on the rounding in a merge.
        compute_path: implementation used with the active adapters in the current mode, and the reason.
    """

    path: str
    architecture: str
    projection: str
    shape: tuple[int, int, int]
    storage: str
    nbytes: int
    dense_nbytes: int
    ranks: dict[str, int]
    num_adapter_parameters: dict[str, int]
    trainable: tuple[str, ...]
    merged: tuple[str, ...]
    merge_error: float | None
    delta_kept: float | None
    merge_notes: tuple[str, ...]
    compute_path: str


@dataclass(frozen=True)
class ExpertsReport:
    """Report on all stacks of a model; `str()` gives a table, `to_dict` returns plain data.

    Args:
        stacks: reports on the stacks, in the order of the model's modules.
        left_alone: path -> reason, for experts that are neither quantized nor adapted.
    """

    stacks: tuple[StackReport, ...]
    left_alone: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(stack.nbytes for stack in self.stacks)

    @property
    def dense_nbytes(self) -> int:
        return sum(stack.dense_nbytes for stack in self.stacks)

    @property
    def num_weights(self) -> int:
        """Number of weights of the experts, independent of their storage."""
        return sum(stack.shape[0] * stack.shape[1] * stack.shape[2] for stack in self.stacks)

    @property
    def num_adapter_parameters(self) -> int:
        return sum(sum(stack.num_adapter_parameters.values()) for stack in self.stacks)

    @property
    def num_trainable_parameters(self) -> int:
        return sum(stack.num_adapter_parameters[name] for stack in self.stacks for name in stack.trainable)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (
                f"{stack.path}.{stack.projection}",
                stack.architecture,
                "x".join(map(str, stack.shape)),
                stack.storage,
                f"{stack.nbytes / 2**20:.2f}",
                _join(f"{name}: {rank}" for name, rank in stack.ranks.items()),
                _join(stack.trainable),
                _join(stack.merged),
                "" if stack.merge_error is None else f"{stack.merge_error:.4f}",
                "" if stack.delta_kept is None else f"{stack.delta_kept:.3f}",
                stack.compute_path,
            )
            for stack in self.stacks
        ]
        header = (
            "stack",
            "class",
            "shape",
            "storage",
            "MiB",
            "rank",
            "trainable",
            "merged",
            "error",
            "kept",
            "computed by",
        )
        lines = [tabulate(rows, header, disable_numparse=True)]
        lines += [f"{stack.path}.{stack.projection}: {note}" for stack in self.stacks for note in stack.merge_notes]
        lines += [f"not adapted: {path} ({reason})" for path, reason in self.left_alone.items()]
        lines.append(
            f"{self.num_weights:,} weights in {self.nbytes / 2**20:.2f} MiB ({self.dense_nbytes / 2**20:.2f} MiB "
            f"before); {self.num_adapter_parameters:,} adapter parameters, {self.num_trainable_parameters:,} trainable"
        )
        return "\n".join(lines)


def _join(names: Iterator[str] | tuple[str, ...]) -> str:
    return ", ".join(names) or "-"


def experts_report(model: nn.Module) -> ExpertsReport:
    """Reports on every experts module of a model, quantized or not, with or without an adapter."""
    stacks = []
    for path, module in find_experts(model):
        if isinstance(module, QuantizedExperts):
            stacks += [_of_stack(path, module, name) for name in module.layout.projections]
        else:
            stacks += _of_plain_module(path, module)
    left_alone = {
        path: UNSUPPORTED_CLASSES[type(module).__name__]
        for path, module in model.named_modules()
        if type(module).__name__ in ALWAYS_ON_CLASSES
    }
    return ExpertsReport(tuple(stacks), left_alone)


def _of_stack(path: str, experts: QuantizedExperts, projection: str) -> StackReport:
    stack, layer = experts.stack(projection), experts.get_submodule(projection)
    factors, merged = {}, []
    if isinstance(layer, ExpertsLora):
        factors = {name: layer.factors(name) for name in layer.lora_A}
        merged = layer.merged_adapters
    return StackReport(
        path=path,
        architecture=experts.layout.class_name,
        projection=projection,
        shape=tuple(stack.shape),
        storage=str(stack.storage or stack.dtype).removeprefix("torch."),
        nbytes=stack.nbytes,
        dense_nbytes=stack.shape.numel() * stack.dtype.itemsize,
        ranks={name: whole_shape(A)[1] for name, (A, _) in factors.items()},
        num_adapter_parameters={
            name: whole_shape(A).numel() + whole_shape(B).numel() for name, (A, B) in factors.items()
        },
        trainable=tuple(name for name, (A, B) in factors.items() if A.requires_grad and B.requires_grad),
        merged=tuple(merged),
        merge_error=None if stack.fidelity is None else stack.fidelity.relative_error,
        delta_kept=None if stack.fidelity is None else stack.fidelity.delta_kept,
        merge_notes=stack.merge_notes,
        compute_path=str(experts.compute_path(projection)),
    )


def _of_plain_module(path: str, module: nn.Module) -> list[StackReport]:
    layout = read_layout(module, path)
    return [
        StackReport(
            path=path,
            architecture=layout.class_name,
            projection=name,
            shape=tuple(module._parameters[name].shape),
            storage=str(module._parameters[name].dtype).removeprefix("torch."),
            nbytes=module._parameters[name].nbytes,
            dense_nbytes=module._parameters[name].nbytes,
            ranks={},
            num_adapter_parameters={},
            trainable=(),
            merged=(),
            merge_error=None,
            delta_kept=None,
            merge_notes=(),
            compute_path="transformers",
        )
        for name in layout.projections
    ]
