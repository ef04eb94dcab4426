"""leaderboard FOLDER: the tables of all records below a folder."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..settings import convert
from . import OK, _terminal
from ._options import Parser

if TYPE_CHECKING:
    from ..record import Record

COLUMNS = (  # a table's, by which --columns names them
    "acc asr reactivated ra der seconds benign_count acc_drop worst_asr interval control_drop rank "
    "n published.acc published.asr published.der"
)


def main(words: list[str]) -> int:
    parser = Parser(prog="bench.py leaderboard", allow_abbrev=False)
    parser.add_argument("folder", nargs="+", help="records are looked for here and below")
    kinds = ("screen", "markdown", "csv", "json", "latex")
    parser.add_argument("--format", choices=kinds, help="what is printed (default: screen)")
    parser.add_argument("--attack", nargs="+", default=[], help="print these only; also: mean")
    parser.add_argument("--over", nargs="+", default=[], help="of these attacks alone, and means")
    parser.add_argument("--defense", nargs="+", default=[], help="these alone, beside none")
    parser.add_argument("--benign-fraction", nargs="+", default=[], metavar="F", help="these alone")
    parser.add_argument("--columns", nargs="+", default=[], help=f"these only, of {COLUMNS}")
    parser.add_argument("--top", metavar="N", help="the first rows of each table only")
    parser.add_argument("--undefended", action="store_true", help="what attacks do, undefended")
    parser.add_argument("--page", metavar="FILE.html", help="write all boards as a page")
    parser.add_argument("--triggers", metavar="DIR", help="PNG files for the page's gallery")
    parser.add_argument("--figures", metavar="DIR", help="write figures for papers")
    options = parser.read(words)
    if options["triggers"] and not options["page"]:
        raise UsageError("--triggers is for --page FILE.html")
    for name in ("columns", "top"):
        if options[name] and options["format"] in ("csv", "json"):
            raise UsageError(f"--{name} is for --format screen, markdown and latex")
    top = convert(options["top"], int | None, "--top") if options["top"] else None
    if top is not None and top < 1:
        raise UsageError(f"--top must be at least 1, got {top}")
    if options["undefended"] and (options["format"] or "screen") not in ("screen", "markdown"):
        raise UsageError("--undefended is for --format screen and markdown")
    for name in ("attack", "defense", "columns", "top"):
        if options["undefended"] and options[name]:
            raise UsageError(f"--{name} is nothing to --undefended")

    from ..record import read_records

    folders = [Path(folder) for folder in options["folder"]]
    records = _of(read_records(folders), "attack", options["over"], "--over")
    records = _of(records, "defense", options["defense"], "--defense")
    records = _with(records, options["benign_fraction"])
    table = import_module("purebench.leaderboards.table")
    renders = {"csv": table.as_csv, "json": table.as_json}
    writes = options["page"] or options["figures"]
    kind = options["format"] or (None if writes else "screen")
    try:
        if options["undefended"]:
            undefended = import_module("purebench.leaderboards.undefended")
            room = {} if kind == "markdown" else {"width": _terminal.width()}
            print(getattr(undefended, kind or "screen")(records, **room).rstrip("\n"))
        elif kind in renders:
            print(renders[kind](records, options["attack"]).rstrip("\n"))
        elif kind:
            chosen = (records, options["attack"], options["columns"], top)
            room = {"width": _terminal.width()} if kind == "screen" else {}
            print(getattr(table, kind)(*chosen, **room).rstrip("\n"))
        if options["page"]:
            page = import_module("purebench.leaderboards.page")
            page.write(records, folders, Path(options["page"]), options["triggers"])
            print(f"page      {options['page']}", file=sys.stderr)
        if options["figures"]:
            figures = import_module("purebench.leaderboards.figures")
            for path in figures.draw(records, Path(options["figures"])):
                print(f"figure    {path}", file=sys.stderr)
    except ValueError as error:  # two protocols, no such table, a gallery without pictures
        raise UsageError(str(error)) from error
    return OK


def _of(records: list[Record], side: str, names: list[str], option: str) -> list[Record]:
    """Those of the attacks, or defenses, that are named, if any, and of ``none``."""
    present = [getattr(record.cell, side)["name"] for record in records]
    table = import_module("purebench.leaderboards.table")
    if unknown := [name for name in names if name not in present]:
        hint = table.near_name(unknown[0], set(present))
        raise UsageError(f"{option} {unknown[0]}: no record of it{hint}")
    wanted = {*names, "none"} if names else set(present)
    return [record for record, name in zip(records, present, strict=True) if name in wanted]


def _with(records: list[Record], shares: list[str]) -> list[Record]:
    """Those of the benign shares that are given, if any."""
    wanted = {convert(share, float, "--benign-fraction") for share in shares}
    if missing := wanted - {record.cell.benign_fraction for record in records}:
        raise UsageError(f"--benign-fraction {min(missing):g}: no record of it")
    return [record for record in records if not wanted or record.cell.benign_fraction in wanted]
