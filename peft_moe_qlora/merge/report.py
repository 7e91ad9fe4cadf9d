"""The report of a merge and its fidelity: `merge_report.json`, and a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..quantization import Fidelity
from .check import MergeCheck

REPORT_NAME = "merge_report.json"
_NAMED = 20


@dataclass(frozen=True)
class FidelityRow:
    """Fidelity of one stack of experts, or of one other tensor.

    Args:
        name: name in the model.
        relative_delta: L2 norm of the delta, relative to the exact merged weights.
        relative_error: L2 error of the written weights, relative to the exact merged weights.
        delta_kept: fraction of the delta that the written weights keep; None if the delta is zero.
    """

    name: str
    relative_delta: float
    relative_error: float
    delta_kept: float | None

    @classmethod
    def of(cls, name: str, fidelity: Fidelity) -> FidelityRow:
        return cls(name, fidelity.relative_delta, fidelity.relative_error, fidelity.delta_kept)


@dataclass(frozen=True)
class Verification:
    """Comparison of a merged model with the unmerged adapter on a text.

    Args:
        num_tokens: number of compared positions.
        kl: mean KL divergence of the merged model's next-token distribution from the unmerged adapter's, in nats.
        equal_argmax: fraction of positions with the same most likely token (top-1 agreement).
        kl_of_base: the same divergence for the base without adapter, as a reference.
    """

    num_tokens: int
    kl: float
    equal_argmax: float
    kl_of_base: float


@dataclass(frozen=True)
class MergeReport:
    """Report of a merge or, if `tensors_written` is 0, of a planned one.

    Args:
        base: directory of the base.
        adapter: directory of the adapter.
        adapter_sha256: SHA-256 of the adapter's weights.
        onto: the weights that the deltas were added to, as in `merge_checkpoint`.
        storage: dtype or format of the written weights.
        tensors_expected: number of checkpoint tensors that the adapter should change; in a quantized merge, number of
            stacks and layers.
        tensors_changed: number of these that changed.
        tensors_written: number of tensors in the new checkpoint.
        stacks: fidelity of stacks of experts.
        others: fidelity of linear layers and other changed tensors.
        merged_before: SHA-256 of the adapters that had been merged into the base before.
        notes: additional information on this merge.
        verification: comparison on a text; None if it was not requested.
        check: comparison of a quantized merge with the unmerged adapter.
    """

    base: str
    adapter: str
    adapter_sha256: str
    onto: str
    storage: str
    tensors_expected: int
    tensors_changed: int
    tensors_written: int
    stacks: tuple[FidelityRow, ...] = ()
    others: tuple[FidelityRow, ...] = ()
    merged_before: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    verification: Verification | None = field(default=None)
    check: MergeCheck | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MergeReport:
        """Creates a report from the parsed JSON of `to_dict`."""
        for name in ("base", "adapter", "adapter_sha256"):
            if not isinstance(values[name], str):
                raise TypeError(f"{name}={values[name]!r:.200} is not a string")
        rows = {name: tuple(FidelityRow(**row) for row in values[name]) for name in ("stacks", "others")}
        lists = {name: tuple(values[name]) for name in ("merged_before", "notes")}
        found = values["verification"]
        verification = None if found is None else Verification(**found)
        checked = values.get("check")
        check = None if checked is None else MergeCheck(**checked)
        return cls(**{**values, **rows, **lists, "verification": verification, "check": check})

    @classmethod
    def read(cls, directory: Path) -> MergeReport | None:
        """The report of a merged checkpoint; None if there is none.

        Raises:
            ValueError: the report is damaged.
        """
        file = directory / REPORT_NAME
        if not file.is_file():
            return None
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is unreadable ({type(error).__name__}: {error}). Expected the report of a merge. Remove the "
                "file, and do not merge an adapter twice: without the report this is not detected."
            ) from error

    def __str__(self) -> str:
        lines = [_table(self.stacks)] if self.stacks else []
        if self.others:
            lines.append(
                f"{len(self.others)} other tensors; the largest error and the smallest kept share of a delta:"
            )
            lines.append(_table(_worst(self.others)))
        lines += self.notes
        lines.append(
            f"merged onto {self.onto} weights as {self.storage}: {self.tensors_expected} tensors expected to change, "
            f"{self.tensors_changed} changed, {self.tensors_written} written"
        )
        if self.check is not None:
            lines.append(f"merged model: {self.check}")
        if self.verification is not None:
            found = self.verification
            lines.append(
                f"KL divergence from the unmerged adapter: {found.kl:.2e} (base without adapter: "
                f"{found.kl_of_base:.2e}), top-1 agreement: {found.equal_argmax:.2%} of {found.num_tokens} positions"
            )
        return "\n".join(lines)


def note_of_lost(what: str, names: list[str]) -> str:
    """Note that deltas are lost in rounding, with the first twenty names."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {what} whose deltas are lost in rounding: {', '.join(names[:_NAMED])}{more}"


def _worst(rows: Iterable[FidelityRow]) -> list[FidelityRow]:
    rows = list(rows)
    kept = [row for row in rows if row.delta_kept is not None]
    worst = [
        max(rows, key=lambda row: row.relative_error),
        *([min(kept, key=lambda row: row.delta_kept)] if kept else []),
    ]
    return list(dict.fromkeys(worst))


def _table(rows: Iterable[FidelityRow]) -> str:
    shown = [
        (
            row.name,
            f"{row.relative_delta:.2e}",
            f"{row.relative_error:.2e}",
            "" if row.delta_kept is None else f"{row.delta_kept:.4f}",
        )
        for row in rows
    ]
    return tabulate(shown, ("weights", "relative delta", "relative error", "delta kept"), disable_numparse=True)
