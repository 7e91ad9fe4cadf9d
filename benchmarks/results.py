"""Results of a run of the benchmark: rows, checks, tables, and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

BASELINES = ("transformers", "peft")
ERROR_LIMIT = 6e-3
"""Relative L2 error above which a value is marked."""

SHOWN_SETTINGS = ("repeats", "warmup", "input_sets", "skew", "seed")

REQUIRED = ("shape", "arm", "tokens", "mode", "ms")
"""Required columns of rows from other runs."""


@dataclass
class Row:
    """Results of one layer in one mode with one number of tokens.

    Args:
        shape: name of the layer's shape.
        arm: name of the arm.
        tokens: number of tokens, T.
        mode: `fwd`, `fwd+bwd` or `fwd+bwd+ckpt`.
        ms: median time of single calls; None if not measured, see `note`.
        ms_p20, ms_p80: percentiles of the same.
        peak_mib: peak memory relative to the start; None on a CPU.
        held_mib: memory saved for the backward.
        launched_ms: wall clock time per call, for many calls back to back; only for few tokens.
        graph_ms: device time per call in a CUDA graph; only for few tokens.
        implementation: implementation of transformers' forward with the lowest `ms`.
        graph_implementation: implementation with the lowest `graph_ms`.
        note: failed measurements and their reasons.
        device: device of the measurement, for rows from other runs.
    """

    shape: str
    arm: str
    tokens: int
    mode: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    peak_mib: float | None = None
    held_mib: float | None = None
    launched_ms: float | None = None
    graph_ms: float | None = None
    implementation: str = ""
    graph_implementation: str = ""
    note: str = ""
    device: str = ""

    def __str__(self) -> str:
        return f"{self.shape}, {self.arm}, T = {self.tokens}, {self.mode}"


@dataclass
class Check:
    """Relative L2 errors of one layer against fp32, by name of the tensor."""

    shape: str
    arm: str
    tokens: int
    errors: dict[str, float]


@dataclass
class LayerInfo:
    """One layer: MiB of its frozen weights, and its implementation."""

    shape: str
    arm: str
    weights_mib: float
    computed_by: str


@dataclass
class Results:
    """Results of one run.

    Args:
        device: name of the device.
    versions: package -> version.
    settings: the options of the command.
    layers: the layers.
    rows: measurements, including failed ones.
    checks: errors against the reference.
    skipped: measurements that were not started because of the time limit.
    failures: number of errors other than out of memory.
    """

    device: str
    versions: dict[str, str]
    settings: dict[str, Any]
    layers: list[LayerInfo] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: int = 0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n", encoding="utf-8")


def load_rows(paths: Iterable[Path], taken: Iterable[str] = ()) -> list[Row]:
    """Rows of JSON files in the format of this benchmark: `{"device": ..., "rows": [{...}, ...]}`.

    If the name of an arm is taken or occurs in several files, the name of the file is appended.

    Raises:
        ValueError: a row has not all required columns.
    """
    names = {column.name for column in fields(Row)}
    taken = set(taken)
    rows = []
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        renamed: dict[str, str] = {}
        for found in content["rows"]:
            missing = [name for name in REQUIRED if name not in found]
            if missing:
                raise ValueError(f"{path}: a row has no {missing}. Expected {list(REQUIRED)}, found {found}.")
            row = Row(**{name: value for name, value in found.items() if name in names})
            row.arm = renamed.setdefault(row.arm, f"{row.arm} ({path.stem})" if row.arm in taken else row.arm)
            row.device = row.device or content.get("device", "")
            rows.append(row)
        taken |= set(renamed.values())
    return rows


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _ratio(row: Row, baseline: Row | None) -> str:
    if row.ms is None or baseline is None or baseline.ms is None:
        return ""
    return f"{row.ms / baseline.ms:.2f}"


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def timing_table(rows: Sequence[Row], modes: Sequence[str]) -> str:
    """Table of one shape: times, their ratios to the baselines with the same tokens and mode, and memory."""
    arms = _unique(row.arm for row in rows)
    rows = sorted(rows, key=lambda row: (modes.index(row.mode), row.tokens, arms.index(row.arm)))
    at = {(row.arm, row.tokens, row.mode): row for row in rows}
    header = ("mode", "tokens", "arm", "ms", *(f"/ {name}" for name in BASELINES))
    header += ("peak MiB", "held MiB", "launched ms", "graph ms", "implementation")
    lines = [
        (
            row.mode,
            row.tokens,
            row.arm,
            _number(row.ms, 3),
            *(_ratio(row, at.get((name, row.tokens, row.mode))) for name in BASELINES),
            _number(row.peak_mib, 1),
            _number(row.held_mib, 1),
            _number(row.launched_ms, 3),
            _number(row.graph_ms, 3),
            ", graph: ".join(_unique(filter(None, (row.implementation, row.graph_implementation)))),
        )
        for row in rows
    ]
    align = ("left", "right", "left", *["right"] * 7, "left")
    return tabulate(lines, header, disable_numparse=True, colalign=align)


def check_table(checks: Sequence[Check]) -> str:
    """Table of the errors of one shape; `!` marks errors above the limit and NaN."""
    names = _unique(name for check in checks for name in check.errors)

    def cell(error: float | None) -> str:
        return "" if error is None else f"{error:.2e}" + ("" if error <= ERROR_LIMIT else "!")

    lines = [(check.arm, check.tokens, *(cell(check.errors.get(name)) for name in names)) for check in checks]
    align = ("left", *["right"] * (1 + len(names)))
    return tabulate(lines, ("arm", "tokens", *names), disable_numparse=True, colalign=align)


def report(results: Results, rows: Sequence[Row], titles: dict[str, str], modes: Sequence[str]) -> str:
    """The whole report as text.

    Args:
        results: results of this run.
        rows: rows of this run and of others.
        titles: name of a shape -> description.
        modes: modes in the order of the report.
    """
    parts = [
        f"{results.device}; " + ", ".join(f"{name} {version}" for name, version in results.versions.items()),
        "; ".join(f"{name} {results.settings[name]}" for name in SHOWN_SETTINGS),
    ]
    for shape in _unique(row.shape for row in rows):
        of_shape = [row for row in rows if row.shape == shape]
        parts.append(f"{shape}: {titles.get(shape, 'measured elsewhere')}")
        parts.append(timing_table(of_shape, _unique([*modes, *(row.mode for row in of_shape)])))
        layers = [
            f"{layer.arm}: weights {layer.weights_mib:.2f} MiB; {layer.computed_by}"
            for layer in results.layers
            if layer.shape == shape
        ]
        notes = [f"{row}: {' '.join(row.note.split())}" for row in of_shape if row.note]
        elsewhere = [
            f"{arm}: measured on {device}"
            for arm, device in dict.fromkeys((row.arm, row.device) for row in of_shape if row.device)
        ]
        parts.append("\n".join([*layers, *notes, *elsewhere]))
        checks = [check for check in results.checks if check.shape == shape]
        if checks:
            parts.append(
                f"Relative L2 error against fp32 (! marks errors above {ERROR_LIMIT:g}):\n\n{check_table(checks)}"
            )
    if results.skipped:
        parts.append("Not started, out of time:\n" + "\n".join(results.skipped))
    return "\n\n".join(filter(None, parts))
