"""Results of the benchmark of the training step: rows, tables, and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kernel_categories import CATEGORIES
from step_generation import Generation
from step_optimizers import OptimizerCost
from step_times import HostCall
from tabulate import tabulate


@dataclass
class StepRow:
    """Results of one arm with one number of tokens; `step_times` documents the measurements.

    Args:
        shape: shape of the model.
        arm: name and settings.
        storage: storage of the experts, for `ours`.
        layers: number of layers.
        batch, tokens: number of sequences, and tokens per sequence.
        rank, expert_rank: LoRA rank on attention and on experts.
        optimizer: name of the optimizer.
        milliseconds: time of a step; None if not measured, see `note`.
        tokens_per_second: tokens per second of all sequences.
        resident_gib: weights and factors before the first step.
        trained_parameters: number of values in the factors.
        build_seconds: time to build the model.
        device_milliseconds, kernels, launches, split, other: results of one profiled step.
        host_calls: functions with the most host time.
        graphs: report on CUDA graphs.
        note: reason why there is no time.
        device: device of the measurement, for rows from other runs.
    """

    shape: str = ""
    arm: str = "ours"
    storage: str | None = None
    layers: int | None = None
    batch: int = 1
    tokens: int = 0
    rank: int = 0
    expert_rank: int = 0
    optimizer: str = ""
    milliseconds: float | None = None
    least_milliseconds: float | None = None
    tokens_per_second: float | None = None
    host_milliseconds: float | None = None
    device_milliseconds: float | None = None
    resident_gib: float | None = None
    peak_gib: float | None = None
    warmup_peak_gib: float | None = None
    reserved_gib: float | None = None
    device_gib: float | None = None
    trained_parameters: int = 0
    loss: float | None = None
    build_seconds: float | None = None
    kernels: int | None = None
    launches: int | None = None
    split: dict[str, float] = field(default_factory=dict)
    other: list[tuple[str, float, int]] = field(default_factory=list)
    host_calls: list[HostCall] = field(default_factory=list)
    graphs: str = ""
    note: str = ""
    device: str = ""

    @property
    def what(self) -> str:
        """The arm, with the storage if it has one."""
        return self.arm if self.storage is None else f"{self.arm} {self.storage}"

    @property
    def label(self) -> str:
        sequences = f"{self.batch} x " if self.batch > 1 else ""
        ranks = f"r {self.rank}" + (f", experts {self.expert_rank}" if self.expert_rank != self.rank else "")
        return f"{self.what}, {sequences}{self.tokens} tokens, {ranks}, {self.optimizer}"


@dataclass
class LossRow:
    """Losses of one arm, and their difference from those of the plain path.

    Args:
        shape, arm, storage: as in `StepRow`.
        losses: loss of every step.
        largest_difference: largest absolute difference from the plain path in any step; None for the plain path.
        note: reason why there are no losses.
    """

    shape: str
    arm: str
    storage: str | None = None
    losses: list[float] = field(default_factory=list)
    largest_difference: float | None = None
    note: str = ""


@dataclass
class StepResults:
    """Results of one run."""

    device: str
    versions: dict[str, str]
    settings: dict[str, Any]
    steps: list[StepRow] = field(default_factory=list)
    losses: list[LossRow] = field(default_factory=list)
    optimizers: list[OptimizerCost] = field(default_factory=list)
    generation: list[Generation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        content = _rounded(asdict(self))
        path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Rounds times and sizes to five digits, but not losses."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: found if key in ("losses", "loss") else _rounded(found) for key, found in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def load_steps(paths: Iterable[Path]) -> list[StepRow]:
    """Rows of JSON files written by this benchmark.

    Raises:
        ValueError: a file has no steps.
    """
    names = {column.name for column in fields(StepRow)}
    rows = []
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "steps" not in content:
            raise ValueError(f"{path} has no steps. Expected a file written by benchmarks/step.py --json.")
        for found in content["steps"]:
            row = StepRow(**{name: value for name, value in found.items() if name in names})
            row.shape = row.shape or content.get("shape", "")
            row.device = row.device or content.get("device", "")
            row.host_calls = [HostCall(**call) for call in row.host_calls]
            rows.append(row)
    return rows


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _table(lines: Sequence[Sequence[Any]], headers: Sequence[str], names: int = 1) -> str:
    align = (*["left"] * names, *["right"] * (len(headers) - names))
    return tabulate(lines, headers, disable_numparse=True, colalign=align) if lines else ""


def step_table(rows: Sequence[StepRow]) -> str:
    headers = ("arm", "optimizer", "batch", "tokens", "r", "experts r", "ms", "least", "tokens/s", "device", "host")
    headers += ("kernels", "launches", "resident GiB", "peak", "reserved", "loss")
    lines = [
        (
            row.what,
            row.optimizer,
            row.batch,
            row.tokens,
            row.rank,
            row.expert_rank,
            _number(row.milliseconds),
            _number(row.least_milliseconds),
            _number(row.tokens_per_second, 0),
            _number(row.device_milliseconds),
            _number(row.host_milliseconds),
            _number(row.kernels, 0),
            _number(row.launches, 0),
            _number(row.resident_gib, 2),
            _number(row.peak_gib, 2),
            _number(row.reserved_gib, 2),
            _number(row.loss, 4),
        )
        for row in rows
    ]
    return _table(lines, headers, names=2)


def split_table(rows: Sequence[StepRow]) -> str:
    """Device milliseconds by category, with one column per row of `step_table`."""
    rows = [row for row in rows if row.split]
    lines = [
        (name, *(_number(row.split.get(name)) for row in rows))
        for name in CATEGORIES
        if any(name in row.split for row in rows)
    ]
    if rows:
        lines.append(("all", *(_number(row.device_milliseconds) for row in rows)))
    return _table(lines, ("device ms", *(row.label for row in rows)))


def card_table(rows: Sequence[StepRow], allowed: float) -> str:
    """Table of the arms that fit into so many GiB."""
    headers = ("arm", "optimizer", "layers", "batch", "tokens", "r", "experts r", "fits", "ms", "tokens/s")
    headers += ("resident GiB", "peak", "reserved", "of the device")
    lines = [
        (
            row.what,
            row.optimizer,
            row.layers,
            row.batch,
            row.tokens,
            row.rank,
            row.expert_rank,
            "yes" if row.milliseconds is not None else row.note,
            _number(row.milliseconds),
            _number(row.tokens_per_second, 0),
            _number(row.resident_gib, 2),
            _number(max(filter(None, (row.peak_gib, row.warmup_peak_gib)), default=None), 2),
            _number(row.reserved_gib, 2),
            _number(row.device_gib, 2),
        )
        for row in rows
    ]
    return f"{allowed:g} GiB allowed\n\n{_table(lines, headers, names=2)}"


def loss_table(rows: Sequence[LossRow]) -> str:
    lines = [
        (
            row.arm if row.storage is None else f"{row.arm} {row.storage}",
            len(row.losses),
            _number(row.losses[0] if row.losses else None, 5),
            _number(row.losses[-1] if row.losses else None, 5),
            row.note or ("" if row.largest_difference is None else f"{row.largest_difference:.1e}"),
        )
        for row in rows
    ]
    return _table(lines, ("arm", "steps", "first loss", "last loss", "largest difference"))


def optimizer_table(rows: Sequence[OptimizerCost]) -> str:
    lines = [
        (
            row.optimizer,
            f"{row.parameters:,}",
            _number(row.milliseconds, 2),
            _number(row.host_milliseconds, 2),
            _number(row.state_gib, 3),
            _number(row.paged_gib, 3),
            _number(row.peak_gib, 3),
            f"{row.difference:.1e}",
        )
        for row in rows
    ]
    headers = ("optimizer", "parameters", "ms", "host ms", "state GiB", "paged GiB", "peak over it GiB")
    return _table(lines, (*headers, "of AdamW, 3-D"))


def generation_table(rows: Sequence[Generation]) -> str:
    headers = ("arm", "adapter", "cache", "batch", "prompt", "new", "ms a token", "prompt ms", "ms a later token")
    lines = [
        (
            row.arm,
            row.adapter,
            row.cache,
            row.batch,
            row.prompt,
            row.new_tokens,
            _number(row.milliseconds_per_token, 2),
            _number(row.prompt_milliseconds),
            _number(row.milliseconds_per_later_token, 2),
            _number(row.tokens_per_second, 0),
        )
        for row in rows
    ]
    return _table(lines, (*headers, "tokens/s"), names=3)


def report(results: StepResults, rows: Sequence[StepRow], allowed: float | None) -> str:
    """The whole report as text.

    Args:
        results: results of this run.
        rows: steps of this run and of others.
        allowed: memory limit in GiB; None for no limit.
    """
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    parts = [f"{results.device}; {versions}"]
    for shape in dict.fromkeys(row.shape for row in rows):
        of_shape = [row for row in rows if row.shape == shape]
        parts.append(f"{shape}, {', '.join(dict.fromkeys(f'{row.layers} layers' for row in of_shape if row.layers))}")
        parts.append(step_table(of_shape) if allowed is None else card_table(of_shape, allowed))
        parts.append(split_table(of_shape))
        for row in of_shape:
            if row.other:
                lines = [(name[:100], _number(ms, 2), count) for name, ms, count in row.other]
                parts.append(f"{row.label}: kernels without a category\n\n{_table(lines, ('kernel', 'ms', 'number'))}")
            if row.host_calls:
                lines = [(call.name[-90:], _number(call.milliseconds), call.calls) for call in row.host_calls]
                parts.append(f"{row.label}: the host's step\n\n{_table(lines, ('function', 'ms', 'calls'))}")
            parts += [f"{row.label}: {text}" for text in (row.graphs, "" if allowed else row.note) if text]
        measured = dict.fromkeys(f"{row.what}: measured on {row.device}" for row in of_shape if row.device)
        parts.append("\n".join(measured))
    parts += [loss_table(results.losses), optimizer_table(results.optimizers), generation_table(results.generation)]
    parts += results.notes
    return "\n\n".join(filter(None, parts))
