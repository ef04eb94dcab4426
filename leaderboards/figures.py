"""Figures: the charts of a page for a paper, as PDF, SVG and PNG; equal records, equal bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from purebench.heatmap import COLOURS, percent
from purebench.record import Record
from purebench.storage import write_atomic

from .charts import ASR_TICKS, Grid, Point, grid, points, rank_bars
from .plot import short
from .ranks import Ranking
from .rows import boards

ENDINGS = ("pdf", "svg", "png")
COLUMN = 3.4  # inches: one column of a two-column paper

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
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
_LEAD, _MARK, _REST = "#1f5a8f", "#222222", "#8a8a8a"


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write scatter, heat map and rank diagram of every board, where it has them; say where.

    ImportError: matplotlib is not installed; ``purebench.heatmap.REMEDY`` installs it.
    """
    import matplotlib

    written = []
    for index, board in enumerate(boards(records), start=1):
        main = board.overall
        name = re.sub(r"[^A-Za-z0-9_]+", "-", f"{board.dataset}-{board.model}").strip("-")[:60]
        stem = folder / f"{index:02d}-{name}"
        drawings: list[tuple[str, Callable[[Any], None], tuple[float, float]]] = []
        if found := points(main):
            drawings.append(("scatter", partial(_scatter, found=found), (COLUMN, 2.7)))
        if chart := grid(board):
            size = (1.4 + 0.42 * len(chart.attacks), 1.1 + 0.24 * len(chart.defenses))
            drawings.append(("asr", partial(_heat, chart=chart), size))
        if ranking := main.ranking:
            height = 0.75 + 0.24 * len(ranking.mean_ranks)
            drawings.append(("ranks", partial(_ranks, ranking=ranking), (COLUMN, height)))
        with matplotlib.rc_context(_STYLE):
            for kind, paint, size in drawings:
                written += _save(paint, size, stem.with_name(f"{stem.name}-{kind}"))
    return written


def _save(paint: Callable[[Any], None], size: tuple[float, float], stem: Path) -> list[Path]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure.subplots())
    written = []
    for ending in ENDINGS:
        content = io.BytesIO()
        figure.savefig(content, format=ending, dpi=300, metadata=_METADATA[ending])
        written.append(stem.with_name(f"{stem.name}.{ending}"))
        write_atomic(written[-1], content.getvalue())
    return written


def _scatter(axes: Any, found: Sequence[Point]) -> None:
    axes.set_xscale("function", functions=(_root, _square))
    for number, point in enumerate(found, start=1):
        colour = _LEAD if point.on_front else _REST if point.undefended else _MARK
        axes.errorbar(
            100 * point.asr,
            100 * point.acc,
            xerr=[[100 * min(point.asr_std, point.asr)], [100 * point.asr_std]],
            yerr=100 * point.acc_std,
            fmt="o",
            markersize=3.5,
            markerfacecolor=colour if point.whole else "white",
            color=colour,
            elinewidth=0.5,
            label=f"{number}  {short(point.defense)}",
        )
        axes.annotate(
            str(number),
            (100 * point.asr, 100 * point.acc),
            textcoords="offset points",
            xytext=(3, 3),
            fontsize=6.5,
            color=colour,
        )
    front = sorted((100 * point.asr, 100 * point.acc) for point in found if point.on_front)
    if len(front) > 1:
        across, up = zip(*front, strict=True)
        axes.step(across, up, where="post", color=_LEAD, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 104)
    axes.set_xticks([100 * tick for tick in ASR_TICKS], [f"{100 * tick:g}" for tick in ASR_TICKS])
    axes.set_xlabel("ASR % (square-root scale), lower is better")
    axes.set_ylabel("ACC %, higher is better")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.22),
        ncols=2,
        fontsize=6.5,
        frameon=False,
        handletextpad=0.2,
    )


def _root(values: Any) -> Any:
    import numpy as np

    return np.sqrt(np.maximum(values, 0))


def _square(values: Any) -> Any:
    return values**2


def _heat(axes: Any, chart: Grid) -> None:
    shares = [
        [chart.asr(defense, attack) for attack in range(len(chart.attacks))]
        for defense in range(len(chart.defenses))
    ]
    values = [[float("nan") if share is None else share for share in line] for line in shares]
    axes.imshow(values, COLOURS, vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            ink = "black" if share is None or share >= 0.5 else "white"
            text = "–" if share is None else percent(share)
            axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=7)
    axes.set_xticks(range(len(chart.attacks)), [short(name) for name in chart.attacks])
    axes.tick_params(axis="x", rotation=40)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(chart.defenses)), [short(name) for name in chart.defenses])
    axes.set_title("ASR % after defense, lower is better", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _ranks(axes: Any, ranking: Ranking) -> None:
    found = rank_bars(ranking)
    for y, (_, rank, low, high) in enumerate(found):
        axes.plot([low, high], [y, y], color=_LEAD, alpha=0.3, linewidth=5, solid_capstyle="butt")
        axes.plot(rank, y, "o", color=_MARK, markersize=3.5)
    axes.set_yticks(range(len(found)), [short(bar[0]) for bar in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    gap = f"{ranking.critical_difference:.2f}"
    axes.set_xlabel(f"mean rank over {ranking.block_count} attacks; bar: critical difference {gap}")
