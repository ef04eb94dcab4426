"""Table: rows as text; for the screen, as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from tabulate import SEPARATING_LINE, tabulate

from purebench.errors import near_match, plain
from purebench.record import Record

from . import reference
from .intervals import Interval, deviation
from .ranks import Ranking
from .rows import (
    BENT,
    NOTICED,
    PLAIN,
    SHARES,
    TOLERATED_DROP,
    UNDEFENDED,
    Board,
    Row,
    Table,
    boards,
)

LINE = f"below the line: mean ACC drop over {100 * TOLERATED_DROP:g} points"

_MEASURES = (*SHARES, "seconds")
_LEAST = 40  # characters in a line of words, however narrow the terminal
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_BENT, _MOVED = "†", "‡"


@dataclass(frozen=True)
class Column:
    """name: field of a row, or of its published reference after "published.".

    unit: %, pp (percentage points) or "".
    better: where better lies, up or down; "" where nowhere.
    """

    name: str
    label: str
    unit: str = ""
    better: Literal["↑", "↓", ""] = ""

    @property
    def heading(self) -> str:
        return " ".join(part for part in (self.label, self.unit, self.better) if part)

    @property
    def rivals(self) -> bool:
        """Whether one defense can be better than another by its spread here."""
        return self.name in SHARES

    def values(self, row: Row) -> tuple[float, ...]:
        """One a seed, or the one there is."""
        if self.name == "n":
            return (len(row.acc),)
        owner, _, name = self.name.rpartition(".")
        found = getattr(row.published if owner else row, name, None)
        return found if isinstance(found, tuple) else () if found is None else (found,)

    def text(self, row: Row) -> str:
        if self.name == "defense":
            return row.defense
        if self.name == "interval":
            return interval(row.intervals.get("der"))
        values = self.values(row)
        if self.name in ("benign_count", "n"):
            return f"{values[0]:,}"
        return spread(values, self.unit in ("%", "pp"), 2 if self.name == "rank" else 1)


DEFENSE = Column("defense", "defense")
ACC, ASR = Column("acc", "ACC", "%", "↑"), Column("asr", "ASR", "%", "↓")
RA, DER = Column("ra", "RA", "%", "↑"), Column("der", "DER", "%", "↑")
REACTIVATED = Column("reactivated", "reactivated ASR", "%", "↓")
SECONDS = Column("seconds", "seconds", "", "↓")
BENIGN = Column("benign_count", "benign")
OF_MEANS = (
    Column("acc_drop", "ACC drop", "pp", "↓"),
    Column("worst_asr", "worst ASR", "%", "↓"),
    Column("interval", "DER 95 %"),
    Column("control_drop", "clean ACC drop", "pp", "↓"),
    Column("rank", "rank", "", "↓"),
    Column("n", "n"),
)
PUBLISHED = (
    Column("published.acc", "published ACC", "%", "↑"),
    Column("published.asr", "published ASR", "%", "↓"),
    Column("published.der", "published DER", "%", "↑"),
)


COLUMNS = (DEFENSE, ACC, ASR, REACTIVATED, RA, DER, SECONDS, BENIGN, *OF_MEANS, *PUBLISHED)


SPARED = (  # from a terminal that is too narrow for all, in this order
    *("published.der", "published.acc", "published.asr", "interval", "rank", "benign_count"),
    *("control_drop", "seconds", "worst_asr", "acc_drop", "reactivated", "n", "ra", "der"),
)


def columns(table: Table) -> list[Column]:
    """Those that a table has numbers for: always the narrow seven, n where rows differ in it."""
    drop, worst, between, control, rank, n = OF_MEANS
    always = {DEFENSE, ACC, ASR, RA, DER, SECONDS, BENIGN}
    order = [DEFENSE, ACC, ASR, REACTIVATED, RA, DER, SECONDS, BENIGN]
    if len({len(row.acc) for row in table.rows if row.acc}) > 1:
        order.append(n)
    if table.kind == "mean":
        always |= {drop, worst, n}
        order = [DEFENSE, ACC, drop, control, ASR, worst, REACTIVATED, RA, DER, between, rank]
        order += [SECONDS, BENIGN, n]
    order += PUBLISHED
    return [
        column
        for column in order
        if (not table.shown or column is DEFENSE or column.name in table.shown)
        and (column in always or any(column.text(row).strip("–") for row in table.rows))
    ]


def spread(values: tuple[float, ...], percent: bool, digits: int = 1) -> str:
    """Mean, and for several values ± the sample standard deviation."""
    if not values:
        return "–"
    scale, digits = (100, 2) if percent else (1, digits)
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    deviated = deviation(values)
    return mean if deviated is None else f"{mean} ± {scale * deviated:.{digits}f}"


def interval(between: Interval | None) -> str:
    """Of a share, in percent."""
    return "–" if between is None else f"{100 * between[0]:.2f} to {100 * between[1]:.2f}"


def outstanding(table: Table, column: Column) -> Row | None:
    """The best row of a column, where it leads the next by more than the spread of both.

    None for single runs, whose spread nobody knows. Undefended networks, defenses below the line
    and means over fewer runs do not compete.
    """
    rivals = [
        (round(statistics.fmean(values), 12), deviation(values), row)
        for row in table.rows
        if column.rivals and row.group == 1 and row.complete and (values := column.values(row))
    ]
    sign = 1 if column.better == "↓" else -1
    rivals.sort(key=lambda rival: sign * rival[0])
    if len(rivals) < 2:
        return None
    (best, own, row), (second, other, _) = rivals[:2]
    if own is None or other is None or abs(second - best) <= own + other:
        return None
    return row


def note(ranking: Ranking) -> str:
    """What the ranks of a mean table rest on."""
    told = [f"rank: mean over {ranking.block_count} attacks, by DER"]
    if ranking.p_value is not None:
        told.append(f"Friedman p = {ranking.p_value:.2g}")
    gap = ranking.critical_difference
    if gap >= len(ranking.mean_ranks) - 1:  # further apart no two ranks can be
        return "; ".join([*told, "too few attacks to tell any two apart (Nemenyi, 0.05)"])
    return "; ".join([*told, f"ranks closer than {gap:.2f} do not differ (Nemenyi, 0.05)"])


def notes(table: Table) -> list[str]:
    """What a reader must know who sees the table alone."""
    told = []
    if table.top is not None and table.top < len(table.rows):
        told.append(f"the first {table.top} of {len(table.rows)} rows")
    if table.weak:
        told.append(f"not counted, since on some seed it did not take: {', '.join(table.weak)}")
    if any(row.group == 2 for row in table.rows[: table.top]):
        told.append(LINE)
    if table.ranking and (not table.shown or "rank" in table.shown):
        told.append(note(table.ranking))
    if table.idle and (not table.shown or "asr" in table.shown):
        told.append(
            f"no gain over {PLAIN} on any attack ({100 * NOTICED:g} points of ASR, and more than "
            f"the spread): {', '.join(table.idle)}"
        )
    shown = columns(table)
    marks = {mark(column, row) for row in table.rows[: table.top] for column in shown}
    if _MOVED in marks:
        told.append(
            f"{_MOVED} on networks that the same command trained on another machine than those of "
            f"{UNDEFENDED}"
        )
    if _BENT in marks:
        told.append(
            f"{_BENT} and over {100 * BENT:g} points of ACC lost to the same ten samples: "
            "more broken than reminded"
        )
    if any(row.published for row in table.rows):
        told.append(reference.NOTE)
    return told


def mark(column: Column, row: Row) -> str:
    """The sign behind an entry that a note explains, or ""."""
    if column is DEFENSE:
        return _MOVED if row.elsewhere else ""
    return _BENT if column is REACTIVATED and row.bent > BENT else ""


def remark(row: Row) -> str:
    return "; ".join(row.remarks)


def numbered(table: Table) -> dict[str, int]:
    """The remarks of the rows that are seen, each once, and their numbers from 1 on."""
    told = dict.fromkeys(map(remark, table.rows[: table.top]))
    return {text: number for number, text in enumerate(filter(None, told), start=1)}


def _raised(number: int | None) -> str:
    return "" if number is None else str(number).translate(_RAISED)


def _told(table: Table) -> list[str]:
    """What stands below a table: its remarks by their numbers, and the notes."""
    remarks = numbered(table)
    return [*(f"{_raised(remarks[text])} {text}" for text in remarks), *notes(table)]


def _chosen(
    records: Sequence[Record],
    only: Sequence[str],
    shown: Sequence[str] = (),
    top: int | None = None,
) -> Iterator[tuple[Board, Table]]:
    found = boards(records)
    _check(shown, {column.name for column in COLUMNS}, "no column")
    attacks = {table.attack for board in found for table in board.tables}
    _check(only, attacks | {name.partition(" (")[0] for name in attacks}, "no table of attack")
    chosen = [(board, table) for board in found for table in board.tables if table.chosen(only)]
    there = {column.name for _, table in chosen for column in columns(table)}
    if missing := [name for name in shown if name not in there]:
        raise ValueError(
            f"no table there has the column {missing[0]!r}{near_name(missing[0], there)}"
        )
    for board, table in chosen:
        yield board, replace(table, shown=tuple(shown), top=top)


def _check(names: Iterable[str], known: set[str], missing: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{missing} {name!r}{near_name(name, known)}")


def near_name(name: str, known: Iterable[str]) -> str:
    """Of an option that takes several: ``near_match``, but for what looks like several in one."""
    return "; names are separated by spaces" if "," in name else near_match(name, known)


# --- texts ----------------------------------------------------------------------------------------


def screen(
    records: Sequence[Record],
    only: Sequence[str] = (),
    shown: Sequence[str] = (),
    top: int | None = None,
    width: int | None = None,
) -> str:
    """All tables, for a terminal; of the attacks in ``only``, with the columns in ``shown``, else
    those that ``width`` characters have room for, and the first ``top`` rows, if any. ValueError
    where there is no such attack or column."""
    return "\n\n".join(_screen(table, width) for _, table in _chosen(records, only, shown, top))


def summary(records: Sequence[Record], width: int | None = None) -> str:
    """For a terminal, of each board the means over attacks; where it has none, those of attacks."""
    found: list[Table] = []
    for board in boards(records):
        kinds = [[table for table in board.tables if table.kind == k] for k in ("mean", "attack")]
        found += kinds[0] or kinds[1] or board.tables
    return "\n\n".join(_screen(table, width) for table in found)


def markdown(
    records: Sequence[Record],
    only: Sequence[str] = (),
    shown: Sequence[str] = (),
    top: int | None = None,
) -> str:
    """All tables, as Markdown; see ``screen``."""
    return "\n\n".join(_pipe(table) for _, table in _chosen(records, only, shown, top)) + "\n"


def latex(
    records: Sequence[Record],
    only: Sequence[str] = (),
    shown: Sequence[str] = (),
    top: int | None = None,
) -> str:
    """All tables, each a ``table`` for the package booktabs; see ``screen``."""
    return latex_text(table for _, table in _chosen(records, only, shown, top))


def latex_text(tables: Iterable[Table]) -> str:
    return "\n\n".join(map(_booktabs, tables)) + "\n"


def _screen(table: Table, width: int | None) -> str:
    """Remarks and notes are those of the columns that are left."""
    table, spared = (table, []) if width is None or table.shown else fitted(table, width)
    told = [*_told(table), *([left_out(spared, "leaderboard --columns")] if spared else [])]
    lines = [*_wrapped([table.title], width), *_simple(table).split("\n"), *_wrapped(told, width)]
    return "\n".join(map(plain, lines))


def _wrapped(texts: Iterable[str], width: int | None) -> list[str]:
    """Sentences in lines that a terminal has room for."""
    if width is None:
        return [*texts]
    room = max(width, _LEAST)
    wrap = partial(textwrap.wrap, width=room, subsequent_indent="  ", break_long_words=False)
    return [line for text in texts for line in wrap(text, break_on_hyphens=False)]


def left_out(names: Sequence[str], remedy: str) -> str:
    """What a terminal had no room for, and what shows it."""
    return (
        f"{len(names)} column{'s'[: len(names) > 1]} left out for the width of this terminal: "
        f"{', '.join(names)}; {remedy} shows them"
    )


def fitted(table: Table, width: int) -> tuple[Table, list[str]]:
    """The table without as many of the ``SPARED`` columns as make it fit, and their names."""
    names = [column.name for column in columns(table)]
    spared: list[str] = []
    for name in SPARED:
        if max(map(len, _simple(table).split("\n"))) <= width:
            break
        if name in names:
            spared.append(name)
            table = replace(table, shown=tuple(each for each in names if each not in spared))
    return table, spared


def _simple(table: Table) -> str:
    shown = columns(table)
    lines: list[Any] = []
    for _, texts, first_below in _lines(table, shown):
        lines += [SEPARATING_LINE] if first_below and lines else []
        lines.append([plain(text) for text in texts])
    return _tabulate(shown, lines, "simple")


def _pipe(table: Table) -> str:
    shown = columns(table)
    best = {column: outstanding(table, column) for column in shown}
    lines = []
    for row, texts, first_below in _lines(table, shown):
        if first_below:
            lines.append(["*below: ACC drop > 5*", *[""] * (len(shown) - 1)])
        cells = zip(shown, map(markdown_text, texts), strict=True)
        lines.append([f"**{cell}**" if best[column] is row else cell for column, cell in cells])
    told = [markdown_text(line) for line in _told(table)]
    body = _tabulate(shown, lines, "pipe")
    return "\n\n".join([f"**{markdown_text(table.title)}**", body, *told])


# tabulate escapes LaTeX's own characters: what shall be LaTeX passes as private characters
_BOLD, _END = "\ue000", "\ue001"
_TYPESET = {
    _BOLD: r"\textbf{",
    _END: "}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "·": r"$\cdot$",
    _BENT: r"$^\dagger$",
    _MOVED: r"$^\ddagger$",
    **{chr(raised): f"$^{{{chr(digit)}}}$" for digit, raised in _RAISED.items()},
}


def _booktabs(table: Table) -> str:
    shown = columns(table)
    best = {column: outstanding(table, column) for column in shown}
    lines: list[Any] = []
    for row, texts, first_below in _lines(table, shown):
        lines += [SEPARATING_LINE] if first_below and lines else []
        cells = zip(shown, map(_latex_text, texts), strict=True)
        lines.append(
            [f"{_BOLD}{cell}{_END}" if best[column] is row else cell for column, cell in cells]
        )
    caption = ". ".join([table.title, *_told(table)])
    escaped = tabulate([[_latex_text(caption)]], tablefmt="latex_booktabs", disable_numparse=True)
    body = _typeset(_tabulate(shown, lines, "latex_booktabs"))
    (caption,) = (line for line in escaped.splitlines() if not line.startswith("\\"))
    told = _typeset(caption).strip().removesuffix("\\\\").strip()
    return "\n".join(
        [r"\begin{table}", r"\centering", rf"\caption{{{told}.}}", body, r"\end{table}"]
    )


def _typeset(text: str) -> str:
    for given, wanted in _TYPESET.items():
        text = text.replace(given, wanted)
    return text


def _lines(table: Table, shown: Sequence[Column]) -> Iterator[tuple[Row, list[str], bool]]:
    """Rows, their texts, first the name with the number of its remark, and whether one is the first
    below the line."""
    remarks, above = numbered(table), True
    for row in table.rows[: table.top]:
        first_below = above and row.group == 2
        above = above and not first_below
        raised = {DEFENSE: _raised(remarks.get(remark(row)))}
        texts = [c.text(row) + raised.get(c, "") + mark(c, row) for c in shown]
        yield row, texts, first_below


def _tabulate(shown: Sequence[Column], lines: Sequence[Any], style: str) -> str:
    align = ["left" if column is DEFENSE else "right" for column in shown]
    headings = [column.heading for column in shown]
    return tabulate(lines, headings, tablefmt=style, colalign=align, disable_numparse=True)


def markdown_text(text: str) -> str:
    """Nothing in it is markup; a mean and its deviation stay on one line."""
    for special in "\\|<*`[":
        text = text.replace(special, "\\" + special)
    return plain(text).replace(" ± ", "\u00a0±\u00a0")


def _latex_text(text: str) -> str:
    return "".join(char for char in plain(text) if char not in (_BOLD, _END))


# --- data -----------------------------------------------------------------------------------------


def as_json(records: Sequence[Record], only: Sequence[str] = ()) -> str:
    """All rows, fractions unrounded, one number a seed."""
    content = [_table_data(board, table) for board, table in _chosen(records, only)]
    return json.dumps(content, indent=1) + "\n"


def _table_data(board: Board, table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "board": board.name,
        "attack": table.attack,
        "kind": table.kind,
        "stealth": dict(table.stealth),
        "ranking": None if table.ranking is None else vars(table.ranking),
        "rows": [_row_data(row) for row in table.rows],
    }


def _row_data(row: Row) -> dict[str, Any]:
    return {
        "defense": row.defense,
        "n": len(row.acc),
        **{name: list(getattr(row, name)) for name in _MEASURES},
        "worst_asr": row.worst_asr,
        "intervals": {name: list(between) for name, between in row.intervals.items()},
        "rank": row.rank,
        "below_the_line": row.group == 2,
        "benign_count": row.benign_count,
        "published": None if row.published is None else vars(row.published),
        "remarks": list(row.remarks),
    }


def as_csv(records: Sequence[Record], only: Sequence[str] = ()) -> str:
    """All rows: mean, sample standard deviation and 95 % interval, fractions unrounded."""
    return csv_text(table for _, table in _chosen(records, only))


def csv_text(tables: Iterable[Table]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [f"{name}{part}" for name in _MEASURES for part in ("", "_std", "_low", "_high")]
    ends = ["worst_asr", "rank", "friedman_p", "critical_difference", "benign_count"]
    found = [f"published_{name}" for name in ("acc", "asr", "ra", "der")]
    writer.writerow(["title", "attack", "defense", "n", *parts, *ends, *found, "remarks"])
    for table in tables:
        ranking = table.ranking
        ranked = (ranking.p_value, ranking.critical_difference) if ranking else (None, None)
        for row in table.rows:
            line: list[Any] = [_csv_text(text) for text in (table.title, table.attack, row.defense)]
            line.append(len(row.acc))
            for name in _MEASURES:
                line += _numbers(getattr(row, name), row.intervals.get(name))
            line += [row.worst_asr, row.rank, *ranked, row.benign_count]
            line += vars(row.published).values() if row.published else [None] * 4
            writer.writerow([*line, _csv_text(remark(row))])
    return out.getvalue()


def _numbers(values: tuple[float, ...], between: Interval | None) -> list[float | None]:
    mean = statistics.fmean(values) if values else None
    return [mean, deviation(values), *(between or (None, None))]


def _csv_text(text: str) -> str:
    """With an apostrophe before what a spreadsheet would take for a formula."""
    text = "\n".join(map(plain, text.replace("\r", " ").split("\n")))
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text
