"""Page: all boards as one HTML file, which needs no network and reads without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from purebench.errors import UsageError
from purebench.record import Record
from purebench.storage import need_writable, sha256, write_atomic

from . import plot
from .charts import grid, points, square
from .intervals import Interval
from .rows import Board, Row, Table, boards
from .table import (
    DEFENSE,
    REMARKS,
    Column,
    columns,
    csv_text,
    latex_text,
    notes,
    outstanding,
    plain,
)

REMEDY = "pip install 'purebench[page]'"

_SHADES = 10  # of the heat map, in page.css
# columns whose text elsewhere has no room for a unit
_UNITS = {"benign_count": "images ↓", "n": "seeds", "rank": "mean ↓", "seconds": "wall ↓"}
_MEASURES = {"psnr": ("PSNR", " dB"), "ssim": ("SSIM", ""), "linf": ("L∞", ""), "l2": ("L2", "")}


@dataclass(frozen=True)
class Entry:
    """A cell of a table.

    sort: what the column is sorted by; empty for what is missing. best: leads beyond the spread.
    """

    text: str
    deviation: str = ""
    interval: str = ""
    sort: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table: a defense. records: (what, address) of each."""

    row: Row
    entries: tuple[Entry, ...]
    records: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sheet:
    """A table. groups: rows above the line, rows below it, rows without numbers."""

    table: Table
    columns: tuple[Column, ...]
    groups: tuple[tuple[Line, ...], ...]
    notes: tuple[str, ...]
    stealth: str


@dataclass(frozen=True)
class Square:
    """A cell of the heat map. shade: 0 the lowest ASR, -1 none. remark: what its table says."""

    text: str
    shade: int
    remark: str


@dataclass(frozen=True)
class Section:
    """A board. downloads: (label, file name, data: address)."""

    board: Board
    anchor: str
    subtitle: str
    sheets: tuple[Sheet, ...]
    scatter: plot.Scatter | None
    ranks: plot.RankDiagram | None
    heat: tuple[tuple[str, ...], tuple[tuple[str, tuple[Square, ...]], ...]] | None
    downloads: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Picture:
    caption: str
    source: str


def links(folders: Iterable[Path], page: Path) -> dict[str, str]:
    """Fingerprint of a record -> its address, relative to the page."""
    found: dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            if "records" in path.parts:
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
    need_writable(file.parent)
    gallery = pictures(Path(triggers)) if triggers else ()
    try:
        text = render(records, links(folders, file), gallery)
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
        record_count=len(records),
        protocol=records[0].protocol if records else "",
    )


def _clean(value: Any) -> Any:
    """Of every value on its way into the page; our own style and script are no plain text."""
    return plain(value) if type(value) is str else value


def _section(board: Board, index: int, addresses: Mapping[str, str]) -> Section:
    main = board.overall
    rest = [table for table in board.tables if table is not main]
    rest.sort(key=lambda table: table.kind == "control")
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{board.dataset}-{board.model}-{board.setting}")
    stem = stem.replace("-benign", "").strip("-")[:80]
    texts = (
        ("CSV", "csv", "text/csv", csv_text(board.tables)),
        ("LaTeX", "tex", "text/plain", latex_text(board.tables)),
        ("BibTeX", "bib", "text/plain", bibtex(board, stem)),
    )
    return Section(
        board,
        f"board-{index + 1}",
        _subtitle(board),
        tuple(_sheet(table, addresses) for table in (main, *rest)),
        plot.scatter(points(main)),
        plot.rank_diagram(main.ranking) if main.ranking else None,
        _heat(board),
        tuple(
            (label, f"{stem}.{ending}", _data(kind, text.encode(errors="replace")))
            for label, ending, kind, text in texts
        ),
    )


def _subtitle(board: Board) -> str:
    seeds = sorted({record.cell.seed for record in board.records})
    attacks = sum(table.kind == "attack" for table in board.tables)
    counts = sorted({record.benign_count for record in board.records if record.benign_count})
    images = f" ({', '.join(f'{count:,}' for count in counts)} images)" if counts else ""
    parts = [
        board.setting.replace("benign", f"benign{images}", 1),
        _count(attacks, "attack"),
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}",
        _count(len(board.records), "record"),
    ]
    return " · ".join(parts)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _sheet(table: Table, addresses: Mapping[str, str]) -> Sheet:
    # intervals stand under their means: a page has room for them everywhere
    shown = tuple(
        column
        for column in columns(table)
        if column.name != "interval" and any(column.text(row).strip("–") for row in table.rows)
    )
    best = {column: outstanding(table, column) for column in shown}
    groups: dict[int, list[Line]] = {1: [], 2: [], 3: []}
    for row in table.rows:
        entries = tuple(_entry(column, row, best[column] is row) for column in shown)
        groups[max(row.group, 1)].append(Line(row, entries, _addresses(table, row, addresses)))
    told = (f"{_MEASURES[key][0]} {table.stealth[key]:.3g}{_MEASURES[key][1]}"
            for key in _MEASURES if key in table.stealth)  # fmt: skip
    return Sheet(
        table,
        shown,
        tuple(tuple(groups[group]) for group in (1, 2, 3)),
        tuple(notes(table)),
        ", ".join(told),
    )


def _entry(column: Column, row: Row, best: bool) -> Entry:
    text = column.text(row)
    if column in (DEFENSE, REMARKS):
        return Entry(text, sort=text)
    values = column.values(row)
    mean, _, deviation = text.replace("-", "−").partition(" ± ")
    return Entry(
        mean,
        deviation,
        _interval(row.intervals.get(column.name), column),
        f"{statistics.fmean(values):.9g}" if values else "",
        best,
    )


def _interval(between: Interval | None, column: Column) -> str:
    if between is None or not column.unit:
        return ""
    return f"{100 * between[0]:.2f} – {100 * between[1]:.2f}".replace("-", "−")


def _addresses(table: Table, row: Row, addresses: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    found = []
    for record in row.records:
        attack = f"{record.cell.attack['name']}, " if table.kind == "mean" else ""
        address = addresses.get(record.fingerprint)
        if address:
            found.append((f"{attack}seed {record.cell.seed}", address))
    return tuple(found)


def _heat(
    board: Board,
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[Square, ...]], ...]] | None:
    chart = grid(board)
    if chart is None:
        return None
    lines = []
    for d, defense in enumerate(chart.defenses):
        squares = []
        for a, row in enumerate(chart.rows[d]):
            asr = chart.asr(d, a)
            remark = "; ".join(row.remarks) if row else ""
            if asr is None:
                squares.append(Square("–", -1, remark))
            else:
                shade = min(int(asr * _SHADES), _SHADES - 1)
                squares.append(Square(square(asr), shade, remark))
        lines.append((defense, tuple(squares)))
    return chart.attacks, tuple(lines)


def bibtex(board: Board, key: str) -> str:
    """An entry that names exactly these records."""
    digest = sha256("".join(sorted(record.fingerprint for record in board.records)).encode())
    fields: dict[str, Any] = {
        "title": f"{{Purebench}} leaderboard: {_bibtex_text(board.name)}",
        "author": "{The Purebench developers}",
        "note": f"Protocol {board.records[0].protocol}, {len(board.records)} records, "
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
