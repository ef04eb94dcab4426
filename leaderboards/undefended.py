"""Undefended: what attacks do before anybody defends, one row an attack and poison rate."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from tabulate import tabulate

from purebench.record import Record
from purebench.settings import canonical

from .rows import CONTROL, UNDEFENDED, told_apart
from .table import markdown_text, plain, spread

_HEADINGS = (
    "attack",
    "poison rate",
    "ACC % ↑",
    "ASR %",
    "took",
    "PSNR dB ↑",
    "SSIM ↑",
    "L-inf ↓",
    "L2 ↓",
    "training s",
)


def markdown(records: Sequence[Record]) -> str:
    """Every attack and rate, as Markdown; ``lines`` says what it holds."""
    return _tabulate(records, "pipe", markdown_text)


def screen(records: Sequence[Record]) -> str:
    """Every attack and rate, for a terminal."""
    return _tabulate(records, "simple", plain)


def _tabulate(records: Sequence[Record], style: str, text: Callable[[str], str]) -> str:
    made = [[text(cell) for cell in line] for line in lines(records)]
    align = ["left", *["right"] * (len(_HEADINGS) - 1)]
    return tabulate(made, _HEADINGS, tablefmt=style, colalign=align, disable_numparse=True) + "\n"


def lines(records: Iterable[Record]) -> list[list[str]]:
    """One line an attack and rate: mean ± sample standard deviation over the seeds.

    took: on how many of the seeds the back door opens, see ``Record.took``. Training that did not
    end well counts as one that did not take.
    """
    groups: dict[tuple[str, float], list[Record]] = defaultdict(list)
    undefended = [r for r in records if r.cell.defense["name"] == UNDEFENDED]
    plugins = [(r.cell.attack["name"], r.cell.attack["settings"]) for r in undefended]
    labels = told_apart(plugins, [r.changed.get("attack", ()) for r in undefended], " ({})")
    for plugin, record in zip(plugins, undefended, strict=True):
        groups[labels[canonical(list(plugin))], -record.cell.poison_rate].append(record)
    order = sorted(groups, key=lambda group: (group[0] != CONTROL, group))
    return [_line(attack, groups[attack, rate]) for attack, rate in order]


def _line(attack: str, records: Sequence[Record]) -> list[str]:
    scores = [record.before for record in records if record.before is not None]
    scores = [score for score in scores if not score.diverged]
    cell, opened = records[0].cell, sum(record.took for record in records)
    rate = f"{cell.poison_rate:g}" + (" of the class" if cell.clean_label else "")
    control = cell.attack["name"] == CONTROL

    def stealth(name: str, digits: int) -> str:
        values = [record.stealth[name] for record in records if record.stealth]
        return f"{statistics.fmean(values):.{digits}f}" if values else "–"

    seconds = [record.cost["training_seconds"] for record in records if record.cost]
    return [
        attack,
        "–" if control else rate,
        spread(tuple(score.acc for score in scores), True),
        "–" if control else spread(tuple(score.asr for score in scores), True),
        "–" if control else f"{opened} of {len(records)}",
        stealth("psnr", 1),
        stealth("ssim", 3),
        stealth("linf", 3),
        stealth("l2", 2),
        f"{statistics.fmean(seconds):.0f}" if seconds else "–",
    ]
