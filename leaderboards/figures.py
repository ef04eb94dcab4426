"""Figures: the charts of a page for a paper, as PDF, SVG and PNG; equal records, equal bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from purebench.errors import UsageError
from purebench.heatmap import REMEDY
from purebench.record import Record
from purebench.storage import need_writable, write_atomic

from .charts import Grid, grid, points, square
from .plot import LETTERS, RankDiagram, Scatter, rank_diagram, scatter, short, text_width
from .rows import Board, Table, boards

ENDINGS = ("pdf", "svg", "png")
COLUMN = 3.4  # inches: one column of a two-column paper
SHADES = "Blues"  # one hue: reads the same with and without colour vision, and in grey

_POINTS = 7.0
_SQUARE = (0.42, 0.24)  # inches: a cell of the heat map
_STYLE: dict[Any, Any] = {
    "font.size": _POINTS,
    "pdf.fonttype": 42,  # journals refuse type 3
    "svg.hashsalt": "purebench",  # else ids are random
    "text.parse_math": False,  # a name with two dollar signs is a name
}
# no date, and no version of the library: equal results, equal files
_METADATA = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
_INK, _QUIET, _RULE, _LEAD = "#1c1d1f", "#63666b", "#d9d6cf", "#1f5a8f"


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write scatter, heat map and rank diagram of every board, where it has them; say where.

    UsageError: matplotlib is not installed, or nothing can be written there.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(f"figures need matplotlib: {REMEDY}") from error

    need_writable(folder)
    written = []
    for index, board in enumerate(boards(records), start=1):
        name = re.sub(r"[^A-Za-z0-9_]+", "-", f"{board.dataset}-{board.model}").strip("-")[:60]
        for table in board.conditions:
            rate = re.sub(r"[^0-9a-z.]+", "-", table.attack.removeprefix("mean"))
            rate = rate.rstrip("-") if len(board.conditions) > 1 else ""
            stem = folder / f"{index:02d}-{name}{rate}"
            with matplotlib.rc_context(_STYLE):
                for kind, paint, size in _drawings(board, table):
                    written += _save(paint, size, stem.with_name(f"{stem.name}-{kind}"))
    return written


Paint = Callable[[Any], None]


def _drawings(board: Board, table: Table) -> Iterator[tuple[str, Paint, tuple[float, float]]]:
    """Kind of drawing, what draws it on axes, width and height in inches."""
    if found := scatter(points(table)):
        yield "scatter", partial(_scatter, chart=found), _size(found)
    if chart := grid(board, table):
        yield "asr", partial(_heat, chart=chart), _heat_size(chart)
    if table.ranking:
        ranks = rank_diagram(table.ranking)
        yield "ranks", partial(_ranks, chart=ranks), _size(ranks)


def _save(paint: Paint, size: tuple[float, float], stem: Path) -> list[Path]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size)
    FigureCanvasAgg(figure)
    paint(figure.subplots())
    written = []
    for ending in ENDINGS:
        content = io.BytesIO()
        figure.savefig(content, format=ending, dpi=300, metadata=_METADATA[ending])
        written.append(stem.with_name(f"{stem.name}.{ending}"))
        write_atomic(written[-1], content.getvalue())
    figure.clear()  # its parts hold each other: a hundred of them would wait for the collector
    return written


def _width(chart: Scatter | RankDiagram) -> float:
    """In inches: of a paper's column, or of both."""
    return 2.1 * COLUMN if isinstance(chart, Scatter) and chart.wide else COLUMN


def _size(chart: Scatter | RankDiagram) -> tuple[float, float]:
    return _width(chart), _width(chart) * chart.height / chart.width


def _canvas(axes: Any, chart: Scatter | RankDiagram) -> dict[str, Any]:
    """Axes in the units of the page's drawings; returns how text is set there."""
    axes.set(xlim=(0, chart.width), ylim=(chart.height, 0))
    axes.set_axis_off()
    axes.set_position((0, 0, 1, 1))
    return {"fontsize": LETTERS * 72 * _width(chart) / chart.width}


def _scatter(axes: Any, chart: Scatter) -> None:
    text, frame = _canvas(axes, chart), chart.frame
    for tick in chart.y_ticks:
        axes.hlines(tick.at, frame.left, frame.right, color=_RULE, linewidth=0.4)
        axes.text(frame.left - 6, tick.at, tick.text, ha="right", va="center", color=_QUIET, **text)
    axes.hlines(frame.bottom, frame.left, frame.right, color=_QUIET, linewidth=0.5)
    for tick in chart.x_ticks:
        axes.vlines(tick.at, frame.bottom, frame.bottom + 4, color=_QUIET, linewidth=0.5)
        axes.text(
            tick.at, frame.bottom + 16, tick.text, ha="center", va="baseline", color=_QUIET, **text
        )
    middle = (frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2
    axes.text(
        middle[0],
        chart.height - 6,
        "ASR % ↓ (both axes: square root of the error)",
        ha="center",
        **text,
    )
    axes.text(11, middle[1], "ACC % ↑", rotation=90, ha="center", va="center", **text)
    places = ((mark.x, mark.y) for mark in chart.marks if mark.point.on_front)
    front = sorted(places, key=lambda place: (place[0], -place[1]))
    if len(front) > 1:
        across, down = zip(*front, strict=True)
        axes.step(
            across, down, where="post", color=_LEAD, linewidth=0.7, linestyle=(0, (4, 3)), zorder=2
        )
    for mark in chart.marks:
        point = mark.point
        colour = _LEAD if point.on_front else _QUIET if point.undefended else _INK
        axes.hlines(mark.y, *mark.across, color=_QUIET, linewidth=0.4)
        axes.vlines(mark.x, *mark.down, color=_QUIET, linewidth=0.4)
        fill = colour if point.whole else "white"
        axes.plot(mark.x, mark.y, "o", markersize=3.2, color=colour, markerfacecolor=fill, zorder=3)
        if mark.label is None:
            continue
        if mark.label.leader:
            x, y, to_x, to_y = mark.label.leader
            axes.plot([x, to_x], [y, to_y], color=_QUIET, linewidth=0.35)
        axes.text(mark.label.x, mark.label.y, mark.label.text, va="baseline", color=_INK, **text)


def _ranks(axes: Any, chart: RankDiagram) -> None:
    text = _canvas(axes, chart)
    for tick in chart.ticks:
        axes.vlines(tick.at, 2, chart.axis, color=_RULE, linewidth=0.4)
        axes.text(tick.at, chart.axis + 14, tick.text, ha="center", color=_QUIET, **text)
    for bar in chart.bars:
        axes.hlines(bar.y, bar.low, bar.high, color=_LEAD, alpha=0.3, linewidth=4)
        axes.plot(bar.at, bar.y, "o", markersize=3.2, color=_INK)
        axes.text(chart.names, bar.y, bar.short, ha="right", va="center", color=_INK, **text)
    told = f"mean rank ↓ (bar: critical difference {chart.critical_difference:.2f})"
    axes.text((chart.names + chart.width) / 2, chart.height - 6, told, ha="center", **text)


def _inches(names: Sequence[str]) -> float:
    """Width of the longest name."""
    return max(text_width(short(name)) for name in names) * _POINTS / LETTERS / 72


def _heat_margins(chart: Grid) -> tuple[float, float, float, float]:
    """Left, bottom, right, top, in inches. Names of attacks hang down to the left by 40 degrees."""
    hanging = _inches(chart.attacks)
    left = max(_inches(chart.defenses), 0.77 * hanging - 0.2) + 0.12
    return left, 0.65 * hanging + 0.2, 0.06, 0.3


def _heat_size(chart: Grid) -> tuple[float, float]:
    left, bottom, right, top = _heat_margins(chart)
    across, down = _SQUARE[0] * len(chart.attacks), _SQUARE[1] * len(chart.defenses)
    return max(left + across + right, 2.6), down + bottom + top


def _heat(axes: Any, chart: Grid) -> None:
    width, height = _heat_size(chart)
    left, bottom, _, _ = _heat_margins(chart)
    across, down = _SQUARE[0] * len(chart.attacks), _SQUARE[1] * len(chart.defenses)
    axes.set_position((left / width, bottom / height, across / width, down / height))
    shares = [
        [chart.asr(defense, attack) for attack in range(len(chart.attacks))]
        for defense in range(len(chart.defenses))
    ]
    values = [[float("nan") if share is None else share for share in line] for line in shares]
    axes.pcolormesh(values, cmap=SHADES, vmin=0, vmax=1, edgecolor="white", linewidth=1)
    axes.invert_yaxis()
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            ink = "white" if share is not None and share >= 0.6 else _INK
            row = chart.rows[y][x]
            text = ("–" if share is None else square(share)) + ("*" if row and row.remarks else "")
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=ink)
    for set_ticks, names in ((axes.set_xticks, chart.attacks), (axes.set_yticks, chart.defenses)):
        set_ticks([at + 0.5 for at in range(len(names))], [short(name) for name in names])
    for label in axes.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    remarked = any(row and row.remarks for line in chart.rows for row in line)
    told = " (* a remark in its table)" if remarked else ""
    axes.set_title(f"ASR % ↓ after each defense{told}", fontsize=_POINTS, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
