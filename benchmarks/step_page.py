"""Generates tables of README.md and of docs from the results of step.py and distributed.py.

    python benchmarks/step_page.py

Tables are between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; the text around them is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from step_results import StepRow, load_steps
from tabulate import tabulate

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("model", "arm", "tokens", "r", "experts r", "optimizer")


def _markdown(lines: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _rows(*names: str) -> list[StepRow]:
    return load_steps(RESULTS / f"{name}.json" for name in names)


def _content(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _settings(row: StepRow) -> tuple[object, ...]:
    return row.shape, f"`{row.arm}`", f"{row.tokens:,}", row.rank, row.expert_rank, f"`{row.optimizer}`"


def _figures(row: StepRow) -> tuple[str, ...]:
    if row.milliseconds is None:
        return row.note, "", "", ""
    return (
        f"{row.milliseconds:,.0f}",
        f"{row.tokens_per_second:,.0f}",
        f"{max(row.peak_gib, row.warmup_peak_gib or 0):.2f}",
        f"{row.reserved_gib:.2f}",
    )


def steps(*names: str) -> str:
    """Table with one row per arm: time, and memory that torch allocates and reserves."""
    lines = [(*_settings(row), *_figures(row)) for row in _rows(*names)]
    return _markdown(lines, (*COLUMNS, "ms", "tokens/s", "peak, GiB", "reserved, GiB"))


CASE = {
    "attention": "transformers in 16 bits, LoRA on attention alone",
    "unsloth": "experts of unsloth_zoo in NF4",
    "ours+compile+graphs": "this package, NF4",
    "ours+compile+graphs+liger-head": "this package, NF4, loss without logits, AdamW in 8 bits",
}


def case() -> str:
    """Short table of the arms in `CASE`."""
    rows = {row.arm: row for row in _rows("h200-step-peers")}
    rows |= {row.arm: row for row in _rows("h200-step-4096") if row.optimizer == "adamw8bit-unsynced"}
    lines = [
        (text, f"{row.milliseconds:,.0f}", f"{row.tokens_per_second:,.0f}", f"{row.peak_gib:.1f}")
        for text, row in ((text, rows[arm]) for arm, text in CASE.items())
    ]
    return _markdown(lines, ("", "ms", "tokens/s", "peak, GiB"))


def fits(**names_of_cards: str) -> str:
    """Table of the longest sequences that fit on each GPU, by rank on experts."""
    longest: dict[tuple, StepRow] = {}
    for card, name in names_of_cards.items():
        for row in _rows(name):
            key = (card, row.shape, row.expert_rank)
            if row.milliseconds is not None and (key not in longest or row.tokens > longest[key].tokens):
                longest[key] = row
    lines = [
        (card.replace("_", ""), shape, row.rank, rank, f"{row.tokens:,}", f"{row.tokens_per_second:,.0f}")
        for (card, shape, rank), row in longest.items()
    ]
    return _markdown(lines, ("card, GB", "model", "r", "experts r", "tokens", "tokens/s"))


def losses(*names: str) -> str:
    """Table of the largest differences of losses from those of the plain path, each in the run where it is largest."""
    largest: dict[tuple[str, int], float] = {}
    for name in names:
        for row in _content(name)["losses"]:
            if row["largest_difference"] is not None:
                key = f"`{row['arm']}`", len(row["losses"])
                largest[key] = max(row["largest_difference"], largest.get(key, 0.0))
    lines = [(*key, f"{difference:.1e}") for key, difference in largest.items()]
    return _markdown(lines, ("arm", "steps", "largest difference"))


def optimizers(name: str) -> str:
    """Table of the cost of a step of each optimizer."""
    lines = [
        (
            f"`{row['optimizer']}`",
            f"{row['milliseconds']:.1f}",
            f"{row['host_milliseconds']:.1f}",
            f"{row['state_gib']:.2f}",
            f"{row['paged_gib']:.2f}",
            f"{row['peak_gib']:.2f}",
        )
        for row in _content(name)["optimizers"]
    ]
    return _markdown(lines, ("optimizer", "ms", "host, ms", "state, GiB", "paged, GiB", "peak over it, GiB"))


def generation(*caches_of_results: tuple[str, str]) -> str:
    """Table of the time of a generated token with the adapter, from pairs of a cache and a result."""
    lines = [
        (
            f"`{row['arm']}`",
            cache,
            row["batch"],
            f"{row['milliseconds_per_token']:.1f}",
            f"{row['milliseconds_per_later_token']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
        )
        for cache, name in caches_of_results
        for row in _content(name)["generation"]
        if (row["cache"], row["adapter"]) == (cache, "on")
    ]
    return _markdown(lines, ("arm", "cache", "batch", "ms a token", "ms without the prompt", "tokens/s"))


def several_gpus(*names: str) -> str:
    """Table of steps on several GPUs; ratios are relative to one GPU in the same run."""
    lines = []
    for name in names:
        settings, rows = (_content(name)[key] for key in ("settings", "rows"))
        one = next((row for row in rows if row["mode"] == "one"), None)
        for row in rows:
            speed, resident = f"{row['tokens_per_second']:,.0f}", f"{row['resident_gib']:.1f}"
            if one not in (None, row):
                speed += f" ({row['tokens_per_second'] / one['tokens_per_second']:.2f})"
                resident += f" ({row['resident_gib'] / one['resident_gib']:.2f})"
            found = settings["shape"], f"`{settings['arm']}`", row["mode"], row["processes"]
            lines.append((*found, f"{row['milliseconds']:,.0f}", speed, resident, f"{row['peak_gib']:.1f}"))
    headers = ("model", "arm", "engine", "GPUs", "ms", "tokens/s", "resident, GiB", "peak, GiB")
    return _markdown(lines, headers)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"case": case, "fits": lambda: fits(_16="h200-step-16-gb", _24="h200-step-24-gb")},
    "docs/step.md": {
        "arms": lambda: steps("h200-step-4096", "h200-step-no-checkpointing", "h200-step-2048", "h200-step-peers"),
        "shapes": lambda: steps("h200-step-shapes"),
        "24-gb": lambda: steps("h200-step-24-gb", "h200-step-24-gb-head", "h200-step-24-gb-graphs"),
        "16-gb": lambda: steps("h200-step-16-gb", "h200-step-16-gb-longer"),
        "losses": lambda: losses("h200-step-losses", "h200-step-losses-2", "h200-step-losses-3"),
        "losses-fp32": lambda: losses("h200-step-losses-fp32", "h200-step-losses-fp32-2"),
        "generation": lambda: generation(
            ("dynamic", "h200-step-generation-before"),
            ("captured", "h200-step-generation-reused"),
            ("reused", "h200-step-generation-reused"),
            ("reused", "h200-step-generation-later"),
        ),
    },
    "docs/benchmarks.md": {"step": lambda: steps("h200-step-4096", "h200-step-2048")},
    "docs/distributed.md": {
        "several-gpus": lambda: several_gpus("h200-x2", "h200-x2-graphs", "h200-x2-qwen3-235b"),
    },
    "docs/optimizers.md": {"times": lambda: optimizers("h200-step-optimizers")},
}
"""Page -> name of a table -> function that creates it."""


def with_tables(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """A page with regenerated tables.

    Raises:
        ValueError: the page does not contain the markers of a table.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, has_begin, rest = text.partition(begin)
        _, has_end, after = rest.partition(end)
        if not (has_begin and has_end):
            raise ValueError(f"The page does not contain the table {name}. Expected {begin} and {end}.")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def main() -> None:
    for page, tables in TABLES.items():
        path = ROOT / page
        path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
