"""Plots results of step.py: device time by category, one bar per arm, and tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernel_categories import CATEGORIES, OTHER
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from step_results import StepRow

# by category: products dark, related kernels lighter, others grey
COLORS = (
    "#0072B2",
    "#56B4E9",
    "#A6D8F5",
    "#004A75",
    "#009E73",
    "#D55E00",
    "#E69F00",
    "#F0E442",
    "#CC79A7",
    "#E8BBD3",
    "#7A5195",
    "#555555",
    "#BBBBBB",
)
SPEED_COLOR = "#0072B2"


def plot_steps(rows: Sequence[StepRow], path: Path, title: str = "") -> None:
    """Saves a PNG file.

    Args:
        rows: results of any arms; rows without a time are skipped. Without a profile, the bar is the wall clock time.
        path: path of the file.
        title: title of the figure.

    Raises:
        ValueError: no row has a time.
    """
    rows = [row for row in rows if row.milliseconds is not None]
    if not rows:
        raise ValueError("Nothing to plot: no step has a time.")
    shapes = list(dict.fromkeys(row.shape for row in rows))
    heights = [1.5 + sum(row.shape == shape for row in rows) for shape in shapes]
    figure = Figure(figsize=(12, 1.4 + 0.45 * sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(shapes), 2, squeeze=False, sharey="row", gridspec_kw={"width_ratios": (3, 1), "height_ratios": heights}
    )
    handles = {}
    for shape, (times, speeds) in zip(shapes, panels, strict=True):
        of_shape = [row for row in rows if row.shape == shape]
        _draw_times(times, of_shape)
        times.set(title=f"{shape}: device time of a step", xlabel="ms")
        bars = speeds.barh(
            range(len(of_shape)), [row.tokens_per_second for row in of_shape], color="#0072B2", height=0.7
        )
        speeds.bar_label(bars, fmt="{:,.0f}", padding=3)
        speeds.set(title="tokens per second", xlim=(0, 1.3 * max(row.tokens_per_second for row in of_shape)))
        for panel in (times, speeds):
            panel.grid(alpha=0.3, axis="x")
            panel.spines[["top", "right"]].set_visible(False)
        handles |= {label: handle for handle, label in zip(*times.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 5))
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=150, format="png")


def _draw_times(panel: Axes, rows: Sequence[StepRow]) -> None:
    """One bar per row with the categories, and a line at the wall clock time."""
    places = range(len(rows))
    starts = [0.0] * len(rows)
    for name, color in zip(CATEGORIES, COLORS, strict=True):
        widths = [row.split.get(name, 0.0) for row in rows]
        if any(widths):
            panel.barh(places, widths, left=starts, color=color, label=name, height=0.7)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    plain = [0.0 if row.split else row.milliseconds for row in rows]
    if any(plain):
        panel.barh(places, plain, color=COLORS[CATEGORIES.index(OTHER)], hatch="//", label="not profiled", height=0.7)
    walls = [row.milliseconds for row in rows]
    panel.scatter(walls, places, marker="|", s=260, color="black", linewidth=2, label="wall clock", zorder=3)
    panel.set_xlim(0, 1.05 * max(*walls, *starts))
    panel.set_yticks(places, [row.label.replace(", ", "\n", 1) for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
