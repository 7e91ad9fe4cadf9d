"""What a merge has done, and how true it is: `merge_report.json`, and a table."""

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
    """One stack of experts, or one other tensor.

    Args:
        name: in the model.
        relative_delta: L2 norm of the delta, relative to the exact merged weights.
        relative_error: L2 error of what is written, likewise.
        delta_kept: share of the delta that is in what is written; None where there is none.
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
    """Comparison of a merged model with the live adapter on a text.

    Args:
        num_tokens: positions compared.
        kl: mean KL divergence of the merged model's next-token distribution from the live adapter's, in nats.
        equal_argmax: share of positions where both find the same token likeliest.
        kl_of_base: the same divergence of the base without adapter, which the merge can be measured by.
    """

    num_tokens: int
    kl: float
    equal_argmax: float
    kl_of_base: float


@dataclass(frozen=True)
class MergeReport:
    """Report of a merge or, if `tensors_written` is 0, of a planned one.

    Args:
        base: directory.
        adapter: directory.
        adapter_sha256: of the adapter's weights.
        onto: what was merged onto.
        storage: dtype or 4-bit format of what is written.
        tensors_expected: tensors of the checkpoint that the adapter changes; of a quantized merge, stacks and layers.
        tensors_changed: those that came out changed.
        tensors_written: tensors of the new checkpoint.
        stacks: of experts.
        others: linear layers and whatever else was changed.
        merged_before: SHA-256 of the adapters that the base had in it already.
        notes: what a reader should know.
        verification: None if not asked for.
        check: of a quantized merge, against the live adapter.
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
        """What `to_dict` has given, by way of a file."""
        for name in ("base", "adapter", "adapter_sha256"):
            if not isinstance(values[name], str):
                raise TypeError(f"{name}={values[name]!r:.200}, a string was expected")
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
            ValueError: it is damaged.
        """
        file = directory / REPORT_NAME
        if not file.is_file():
            return None
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} can't be read ({type(error).__name__}: {error}); the report of a merge was expected. Remove "
                "it, and take care not to merge an adapter twice."
            ) from error

    def __str__(self) -> str:
        lines = [_table(self.stacks)] if self.stacks else []
        if self.others:
            lines.append(f"{len(self.others)} other tensors; of those, the largest error and the least share kept:")
            lines.append(_table(_worst(self.others)))
        lines += self.notes
        lines.append(
            f"merged onto {self.onto} as {self.storage}: {self.tensors_expected} tensors expected to change, "
            f"{self.tensors_changed} changed, {self.tensors_written} written"
        )
        if self.check is not None:
            lines.append(f"merged model: {self.check}")
        if self.verification is not None:
            found = self.verification
            lines.append(
                f"KL divergence from the live adapter {found.kl:.2e} (the base's: {found.kl_of_base:.2e}), same "
                f"likeliest token at {found.equal_argmax:.2%} of {found.num_tokens} positions"
            )
        return "\n".join(lines)


def note_of_lost(what: str, names: list[str]) -> str:
    """That deltas are lost in rounding, and whose: the first twenty."""
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
    return tabulate(shown, ("weights", "size of delta", "error", "delta kept"), disable_numparse=True)
