"""Page: all boards as one HTML file, which needs no network and reads without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from purebench.errors import UsageError, plain
from purebench.record import Record, record_files
from purebench.storage import need_writable, sha256, write_atomic

from . import plot
from .charts import grid, points, square
from .intervals import Interval
from .rows import Board, Kind, Row, Table, boards, shared_rate
from .table import (
    DEFENSE,
    LINE,
    Column,
    columns,
    mark,
    notes,
    numbered,
    outstanding,
    remark,
)

REMEDY = "pip install 'purebench[page]'"

_NAME, _REMARK = 80, 300  # letters
_SHADES = 10  # of the heat map, in page.css
# columns whose text elsewhere has no room for a unit
_UNITS = {"benign_count": "images ↓", "n": "seeds", "rank": "mean ↓", "seconds": "wall ↓"}
_MEASURES = {"psnr": ("PSNR", " dB"), "ssim": ("SSIM", ""), "linf": ("L∞", ""), "l2": ("L2", "")}


@dataclass(frozen=True)
class Entry:
    """A cell of a table.

    mark: of a note. spaced: others of its column have a deviation. best: leads beyond the spread.
    """

    text: str
    mark: str
    deviation: str = ""
    interval: str = ""
    spaced: bool = False
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table: a defense.

    remark: number of its remark among the sheet's, 0 without. records: their addresses,
        "HEAD SEED-FINGERPRINT ...", for every HEAD after a "|"; the script puts the sheet's base
        before HEAD, and links to HEAD-sSEED-FINGERPRINT.json.
    """

    row: Row
    entries: tuple[Entry, ...]
    remark: int
    records: str


@dataclass(frozen=True)
class Sheet:
    """A table.

    base: what all addresses of its records begin with. groups: rows above the line, rows below
    it, rows without numbers. remarks: of rows, each once.
    """

    table: Table
    anchor: str
    base: str
    columns: tuple[Column, ...]
    groups: tuple[tuple[Line, ...], ...]
    remarks: tuple[str, ...]
    notes: tuple[str, ...]
    stealth: str


@dataclass(frozen=True)
class Square:
    """A cell of the heat map. shade: 0 the lowest ASR, -1 none."""

    text: str
    shade: int
    remarked: bool


@dataclass(frozen=True)
class Condition:
    """A mean over attacks at one poison rate, drawn. over: anchors of these attacks' sheets."""

    name: str
    sheet: Sheet
    over: str
    scatter: plot.Scatter | None
    ranks: plot.RankDiagram | None
    heat: tuple[tuple[str, ...], tuple[tuple[str, tuple[Square, ...]], ...]] | None


@dataclass(frozen=True)
class Section:
    """A board. sheets: of attacks, then of the control. citation: data: address of its BibTeX."""

    board: Board
    anchor: str
    stem: str
    subtitle: str
    conditions: tuple[Condition, ...]
    sheets: tuple[Sheet, ...]
    citation: str


@dataclass(frozen=True)
class Picture:
    caption: str
    source: str


def links(files: Iterable[Path], page: Path) -> dict[str, str]:
    """Fingerprint of a record -> its address, relative to the page.

    Of files that are named as runs and boards name them: "...-sSEED-FINGERPRINT.json".
    """
    found: dict[str, str] = {}
    for path in files:
        relative = os.path.relpath(path.resolve(), page.resolve().parent)
        found.setdefault(path.stem.rpartition("-")[2], quote(Path(relative).as_posix()))
    return found


def pictures(folder: Path) -> list[Picture]:
    """Every PNG of a folder, for the gallery of triggers; its name is its caption.

    ValueError: a file is no PNG, or there is none.
    """
    found = []
    for path in sorted(folder.glob("*.png")):
        content = path.read_bytes()
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"{path}: not a PNG file")
        found.append(Picture(path.stem.replace("_", " "), _data("image/png", content)))
    if not found:
        raise ValueError(f"{folder}: no PNG file there")
    return found


def write(
    records: Sequence[Record], folders: Sequence[Path], file: Path, triggers: str | None = None
) -> None:
    """Write the page to ``file``, its rows linked to the records in ``folders``.

    triggers: folder of PNG files for the gallery.
    """
    if file.suffix not in (".html", ".htm") or file.is_dir():
        raise UsageError(f"--page {str(file)!r}: a page is an .html file; name it so")
    need_writable(file.parent)
    files = [path for folder in folders for path in record_files(folder)]
    gallery = pictures(Path(triggers)) if triggers else ()
    try:
        text = render(records, links(files, file), gallery)
    except ImportError as error:
        raise UsageError(f"a page needs Jinja2: {REMEDY}") from error
    write_atomic(file, text.encode())


def render(
    records: Sequence[Record],
    addresses: Mapping[str, str] | None = None,
    gallery: Sequence[Picture] = (),
) -> str:
    """The page.

    addresses: of records, by fingerprint, see ``links``; without, rows link to nothing.
    ImportError: Jinja2 is not installed; ``REMEDY`` installs it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    style, script = ((here / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        finalize=_clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = boards(records)
    return environment.get_template("page.html").render(
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        sections=[_section(board, index, addresses or {}) for index, board in enumerate(found)],
        gallery=gallery,
        units=_UNITS,
        below=LINE,
        linked=bool(addresses),
        record_count=len(records),
        protocol=records[0].protocol if records else "",
    )


def _clean(value: Any) -> Any:
    """Of every value on its way into the page; our own style and script are no plain text."""
    return plain(value) if type(value) is str else value


def _section(board: Board, index: int, addresses: Mapping[str, str]) -> Section:
    anchor = f"board-{index + 1}"
    shown = board.conditions
    rest = [table for table in board.tables if all(table is not main for main in shown)]
    rest.sort(key=lambda table: table.kind == "control")
    sheets = [_sheet(t, f"{anchor}-{n}", addresses) for n, t in enumerate((*shown, *rest))]
    anchors = {sheet.table.attack: sheet.anchor for sheet in sheets}
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{board.dataset}-{board.model}-{board.setting}")
    stem = stem.replace("-benign", "").strip("-")[:80]
    return Section(
        board,
        anchor,
        stem,
        _subtitle(board),
        tuple(
            Condition(
                table.attack.removeprefix("mean ").strip("()").replace("rate=", "poison rate "),
                sheet,
                " ".join(anchors[attack] for attack in table.attacks),
                plot.scatter(points(table)),
                plot.rank_diagram(table.ranking) if table.ranking else None,
                _heat(board, table),
            )
            for table, sheet in zip(shown, sheets, strict=False)
        ),
        tuple(sheets[len(shown) :]),
        _data("text/plain", bibtex(board, stem).encode(errors="replace")),
    )


def _subtitle(board: Board) -> str:
    seeds = sorted({record.cell.seed for record in board.records})
    names = (table.attack for table in board.tables if table.kind == "attack")
    attacks = len({re.sub(r" \(rate=[^,)]*\)$", "", name) for name in names})
    counts = sorted({record.benign_count for record in board.records if record.benign_count})
    images = f" ({', '.join(f'{count:,}' for count in counts)} images)" if counts else ""
    rate = shared_rate(board.records)
    parts = [
        board.setting.replace("benign", f"benign{images}", 1),
        _count(attacks, "attack") + ("" if rate is None else f" at poison rate {rate:g}"),
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}",
        _count(len(board.records), "record"),
    ]
    return " · ".join(parts)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _sheet(table: Table, anchor: str, addresses: Mapping[str, str]) -> Sheet:
    shown = tuple(column for column in columns(table) if _tells(column, table))
    remarks = numbered(table)
    best = {column: outstanding(table, column) for column in shown}
    spaced = {c for c in shown if any(" ± " in c.text(row) for row in table.rows)}
    heads: list[dict[str, list[str]]] = []
    for row in table.rows:
        heads.append(_heads(row, addresses) if table.kind != "mean" else {})
    base = _beginning([head for found in heads for head in found])
    groups: dict[int, list[Line]] = {1: [], 2: [], 3: []}
    for row, found in zip(table.rows, heads, strict=True):
        entries = tuple(
            _entry(column, row, best[column] is row, column in spaced, table.kind)
            for column in shown
        )
        places = [" ".join([head[len(base) :], *tails]) for head, tails in found.items()]
        number = remarks.get(remark(row), 0)
        groups[max(row.group, 1)].append(Line(row, entries, number, "|".join(places)))
    told = (f"{_MEASURES[key][0]} {table.stealth[key]:.3g}{_MEASURES[key][1]}"
            for key in _MEASURES if key in table.stealth)  # fmt: skip
    return Sheet(
        table,
        anchor,
        base,
        shown,
        tuple(tuple(groups[group]) for group in (1, 2, 3)),
        tuple(_cut(text, _REMARK) for text in remarks),
        tuple(notes(table)),
        ", ".join(told),
    )


def _tells(column: Column, table: Table) -> bool:
    """Whether a page needs the column: intervals stand under their means, and
    what the subtitle says for all rows is not said again."""
    texts = {column.text(row) for row in table.rows}
    if column.name in ("benign_count", "n"):
        return len(texts) > 1
    return column.name != "interval" and any(text.strip("–") for text in texts)


def _entry(column: Column, row: Row, best: bool, spaced: bool, kind: Kind) -> Entry:
    text = column.text(row)
    if column is DEFENSE:
        text = plain(text)
        half = _NAME // 2  # by their ends namesakes differ
        short = text if len(text) <= _NAME else f"{text[: half - 1]}…{text[-half:]}"
        return Entry(short, mark(column, row))
    mean, _, deviation = text.replace("-", "−").partition(" ± ")
    # of one attack over seeds, it follows from the deviation
    between = row.intervals.get(column.name) if kind == "mean" or not deviation else None
    return Entry(mean, mark(column, row), deviation, _interval(between, column), spaced, best)


def _cut(text: str, most: int) -> str:
    """What is too long; the records have it whole."""
    text = plain(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _interval(between: Interval | None, column: Column) -> str:
    if between is None or not column.unit:
        return ""
    return f"{100 * between[0]:.2f} – {100 * between[1]:.2f}".replace("-", "−")


def _beginning(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in alike)


def _heads(row: Row, addresses: Mapping[str, str]) -> dict[str, list[str]]:
    """Address of a record up to its seed -> seed and fingerprint of each that begins so."""
    found: dict[str, list[str]] = {}
    for record in row.records:
        tail = f"{record.cell.seed}-{record.fingerprint}"
        head, ending, rest = addresses.get(record.fingerprint, "").rpartition(f"-s{tail}.json")
        if ending and not rest:
            found.setdefault(head, []).append(tail)
    return found


def _heat(
    board: Board, condition: Table
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[Square, ...]], ...]] | None:
    chart = grid(board, condition)
    if chart is None:
        return None
    lines = []
    for d, defense in enumerate(chart.defenses):
        squares = []
        for a, row in enumerate(chart.rows[d]):
            asr = chart.asr(d, a)
            shade = -1 if asr is None else min(int(asr * _SHADES), _SHADES - 1)
            text = "–" if asr is None else square(asr)
            squares.append(Square(text, shade, bool(row and row.remarks)))
        lines.append((_cut(defense, _NAME), tuple(squares)))
    return tuple(_cut(attack, _NAME) for attack in chart.attacks), tuple(lines)


def bibtex(board: Board, key: str) -> str:
    """An entry that names exactly these records."""
    protocol = _bibtex_text(board.records[0].protocol)
    digest = sha256("".join(sorted(record.fingerprint for record in board.records)).encode())
    fields: dict[str, Any] = {
        "title": f"{{Purebench}} leaderboard: {_bibtex_text(board.name)}",
        "author": "{The Purebench developers}",
        "note": f"Protocol {protocol}, {len(board.records)} records, "
        f"SHA-256 of their fingerprints {digest[:16]}",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{purebench-{key},", *lines, "}"]) + "\n"


def _bibtex_text(text: str) -> str:
    plain = "".join(char if char.isprintable() and char not in "\\{}~^" else " " for char in text)
    return re.sub(r"([&%$#_])", r"\\\1", plain.replace("·", "--"))


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
