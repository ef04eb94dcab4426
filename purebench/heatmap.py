"""Heat map: shares in [0, 1] as coloured, numbered cells, one panel beside the other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .storage import write_atomic

COLOURS = "cividis"  # reads the same with and without colour vision, and in grey
REMEDY = "pip install 'purebench[figures]'"


class Panel(NamedTuple):
    """values[row][column]; ``axis`` says what the rows are."""

    title: str
    axis: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


def draw(
    panels: Sequence[Panel],
    *,
    columns: str,
    heading: str,
    scale: str,
    stem: Path,
    across: int = 3,
) -> list[Path]:
    """Write ``stem``.png and .svg, and say where.

    columns: what they are. heading: over all panels. scale: what a value is. across: panels in
    a line. ImportError: matplotlib is not installed; ``REMEDY`` installs it.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(panels)
    across = min(across, count)
    down = -(-count // across)
    tallest = max(len(panel.rows) for panel in panels)
    widest = max(len(panel.columns) for panel in panels)
    size = (across * (0.46 * widest + 1.2) + 0.9, down * (0.42 * tallest + 1.15) + 0.7)
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=11)
    grid = figure.subplots(down, across, squeeze=False)
    for spare in list(grid.flat)[count:]:
        spare.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        image = axes.imshow(panel.values, COLOURS, vmin=0, vmax=1, aspect="auto", origin="lower")
        axes.set_title(panel.title, fontsize=10)
        axes.set_xticks(range(len(panel.columns)), panel.columns, fontsize=8)
        axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8)
        axes.set_xlabel(columns, fontsize=9)
        axes.set_ylabel(panel.axis, fontsize=9)
        axes.set_xticks([at - 0.5 for at in range(1, len(panel.columns))], minor=True)
        axes.set_yticks([at - 0.5 for at in range(1, len(panel.rows))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        for y, line in enumerate(panel.values):
            for x, value in enumerate(line):
                ink = "white" if value < 0.5 else "black"
                axes.text(x, y, percent(value), ha="center", va="center", color=ink, fontsize=8)
    bar = figure.colorbar(image, ax=grid, shrink=0.85, pad=0.02, format=_tick)
    bar.set_label(scale, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    written = []
    for ending in ("png", "svg"):
        content = io.BytesIO()
        # no date and no random ids: equal results, equal files
        when = {"Date": None} if ending == "svg" else None
        with matplotlib.rc_context({"svg.hashsalt": stem.name}):
            figure.savefig(content, format=ending, dpi=120, metadata=when)
        written.append(stem.with_name(f"{stem.name}.{ending}"))
        write_atomic(written[-1], content.getvalue())
    return written


def percent(share: float) -> str:
    """Whole percent that says 0 and 100 only of none and all."""
    if share in (0, 1):
        return f"{100 * share:.0f}"
    return f"{min(max(round(100 * share), 1), 99)}"


def _tick(value: float, _: object) -> str:
    return f"{100 * value:.0f} %"
