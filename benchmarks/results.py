"""What a run of the benchmark found: rows, checks, tables of them, and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

BASELINES = ("transformers", "peft")
ERROR_LIMIT = 6e-3
"""Relative L2 error beyond which a value is marked."""

SHOWN_SETTINGS = ("repeats", "warmup", "input_sets", "skew", "seed")

REQUIRED = ("shape", "arm", "tokens", "mode", "ms")
"""Columns that a row measured elsewhere has to have."""


@dataclass
class Row:
    """One layer, in one mode, with one number of tokens.

    Args:
        shape: name of the layer's shape.
        arm: what computed it.
        tokens: T.
        mode: `fwd`, `fwd+bwd` or `fwd+bwd+ckpt`.
        ms: median of single calls; None if there is none, see `note`.
        ms_p20, ms_p80: percentiles of the same.
        peak_mib: most memory over the start; None on a CPU.
        held_mib: memory kept for the backward.
        launched_ms: wall clock time per call of many back to back; for few tokens only.
        graph_ms: device time per call in a CUDA graph; for few tokens only.
        implementation: of transformers' forward, the one that gave the lowest `ms`.
        graph_implementation: the one that gave the lowest `graph_ms`.
        note: what could not be measured, and why.
        device: where it was measured, for rows from elsewhere.
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
    """Relative L2 errors of one layer against fp32, by the name of the tensor."""

    shape: str
    arm: str
    tokens: int
    errors: dict[str, float]


@dataclass
class LayerInfo:
    """One layer as built: MiB of its frozen weights, and what computes it."""

    shape: str
    arm: str
    weights_mib: float
    computed_by: str


@dataclass
class Results:
    """All of one run.

    Args:
        device: name of the device.
        versions: package -> version.
        settings: the options of the command.
        layers: what was built.
        rows: what was measured, and what failed.
        checks: errors against the reference.
        skipped: what was not started for lack of time.
        failures: number of errors other than lack of memory.
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
    """Rows of JSON files written by this benchmark or like it: `{"device": ..., "rows": [{...}, ...]}`.

    An arm whose name is taken, or stands in several files, gets the file's name behind its own.

    Raises:
        ValueError: a row lacks a column.
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
                raise ValueError(f"{path}: a row lacks {missing}; {list(REQUIRED)} are needed. The row: {found}")
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
    """The rows of one shape: times, their ratio to the baselines' of the same tokens and mode, and memory."""
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
    """The errors of one shape; `!` marks what is beyond the limit, or not a number."""
    names = _unique(name for check in checks for name in check.errors)

    def cell(error: float | None) -> str:
        return "" if error is None else f"{error:.2e}" + ("" if error <= ERROR_LIMIT else "!")

    lines = [(check.arm, check.tokens, *(cell(check.errors.get(name)) for name in names)) for check in checks]
    align = ("left", *["right"] * (1 + len(names)))
    return tabulate(lines, ("arm", "tokens", *names), disable_numparse=True, colalign=align)


def report(results: Results, rows: Sequence[Row], titles: dict[str, str], modes: Sequence[str]) -> str:
    """Everything, for people.

    Args:
        results: of this run.
        rows: its rows and those measured elsewhere.
        titles: name of a shape -> what it is.
        modes: in the order in which they are shown.
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
            parts.append(f"Relative L2 error against fp32; ! is beyond {ERROR_LIMIT:g}:\n\n{check_table(checks)}")
    if results.skipped:
        parts.append("Not started for lack of time:\n" + "\n".join(results.skipped))
    return "\n\n".join(filter(None, parts))
