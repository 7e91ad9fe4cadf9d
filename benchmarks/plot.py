"""Plots results of layer.py: time and peak memory against the number of tokens, one row of panels per shape.

Also plots results of step.py: time of a training step by category.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from results import Row, load_rows

MODE_NAMES = {
    "fwd": "Forward",
    "fwd+bwd": "Forward and backward",
    "fwd+bwd+ckpt": "Forward and backward, checkpointed",
}

# colours for the colour-blind (Okabe and Ito)
COLORS = ("#555555", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#000000")
MARKERS = "osv^D<>P"


def _draw(panel: Axes, rows: Sequence[Row], arms: Sequence[str], column: str) -> bool:
    """Plots one line per arm; returns False if there is nothing to plot."""
    drawn = False
    for index, arm in enumerate(arms):
        points = sorted(
            (row.tokens, getattr(row, column)) for row in rows if row.arm == arm and getattr(row, column) is not None
        )
        if points:
            look = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
            panel.plot(*zip(*points), **look, label=arm, linewidth=1.5, markersize=5)
            drawn = True
    return drawn


def _set_axes(panel: Axes, tokens: Sequence[int], title: str, unit: str) -> None:
    panel.set(xscale="log", yscale="log", title=title, xlabel="tokens", ylabel=unit)
    panel.set_xticks(tokens, [str(count) for count in tokens])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3, which="both")
    panel.spines[["top", "right"]].set_visible(False)


def plot(rows: Sequence[Row], path: Path, mode: str = "fwd+bwd", title: str = "") -> None:
    """Saves a PNG file.

    Args:
        rows: results of any shapes, arms and modes.
        path: path of the file.
        mode: mode of the rows to plot.
        title: title of the figure.

    Raises:
        ValueError: no row has a time in this mode.
    """
    rows = [row for row in rows if row.mode == mode and row.ms is not None]
    if not rows:
        raise ValueError(f"Nothing to plot: no row has a time in mode {mode!r}.")
    shapes = list(dict.fromkeys(row.shape for row in rows))
    arms = list(dict.fromkeys(row.arm for row in rows))
    figure = Figure(figsize=(11, 0.8 + 3.8 * len(shapes)), layout="constrained")
    for shape, (time_panel, memory_panel) in zip(shapes, figure.subplots(len(shapes), 2, squeeze=False)):
        of_shape = [row for row in rows if row.shape == shape]
        tokens = sorted({row.tokens for row in of_shape})
        _draw(time_panel, of_shape, arms, "ms")
        _set_axes(time_panel, tokens, f"{shape}: {MODE_NAMES.get(mode, mode).lower()}", "ms")
        if _draw(memory_panel, of_shape, arms, "peak_mib"):
            _set_axes(memory_panel, tokens, f"{shape}: peak memory increase", "MiB")
        else:
            memory_panel.set_axis_off()
            memory_panel.text(0.5, 0.5, "memory was not measured", ha="center", va="center")
    handles = {
        label: handle
        for panel in figure.axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 5))
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=150, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    parser.add_argument("--mode", choices=MODE_NAMES, default="fwd+bwd", help="default: %(default)s")
    args = parser.parse_args()
    if all("steps" in json.loads(path.read_text(encoding="utf-8")) for path in args.results):
        from step_plot import plot_steps
        from step_results import load_steps

        steps = load_steps(args.results)
        plot_steps(steps, args.output, "; ".join(dict.fromkeys(row.device for row in steps if row.device)))
        return
    rows = load_rows(args.results)
    plot(rows, args.output, args.mode, "; ".join(dict.fromkeys(row.device for row in rows if row.device)))


if __name__ == "__main__":
    main()
