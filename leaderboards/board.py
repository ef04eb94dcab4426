"""Board: a folder of records beside the table and the page that they give, for publishing.

``records/`` holds the records, ``about.md``, where there is one, what a reader should know first.
``README.md`` and ``index.html`` follow from these alone, so that a test can hold them to it; and so
does the list of all boards, in the ``README.md`` above them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tabulate import tabulate

from purebench.errors import UsageError
from purebench.record import Record, in_order, read_files
from purebench.storage import need_writable, write_atomic

from . import page, table, undefended
from .rows import CONTROL, UNDEFENDED

TRIGGERS = "triggers"
NONE: Mapping[Path, Record] = MappingProxyType({})


def placed(folder: Path, records: Iterable[Record]) -> dict[Path, Record]:
    """The board's file for each record. One of the same cell gives way, but for one of our own to
    what somebody else reports: that is left out."""
    held = read_files(folder)
    found: dict[Path, Record] = {}
    for record in records:
        cell = record.cell
        words = cell.dataset["name"], cell.model["name"], cell.attack["name"], cell.defense["name"]
        name = re.sub(r"[^A-Za-z0-9_-]", "_", "-".join(map(str, words)))[:100]
        fingerprint = re.sub(r"[^0-9a-f]", "", record.fingerprint)[:64]
        path = folder / "records" / f"{name}-s{cell.seed}-{fingerprint}.json"
        there = found.get(path, held.get(path))
        if record.provenance and there is not None and not there.provenance:
            continue
        found[path] = record
    return found


def add(folder: Path, records: Iterable[Record]) -> int:
    """Write records to a board, where ``placed`` says. How many were written."""
    found = placed(folder, records)
    for path, record in found.items():
        record.write(path)
    return len(found)


def render(folder: Path, more: Mapping[Path, Record] = NONE) -> dict[Path, bytes]:
    """What belongs into the board's README.md and index.html; equal records, equal bytes.

    more: records to come, by the files that they go to.
    ImportError: Jinja2 is not installed; ``page.REMEDY`` installs it.
    """
    files = {**read_files(folder), **more}
    if not files:
        raise UsageError(f"{folder}: no record there; give folders of records to copy")
    records = in_order(files.values())
    readme, html = folder / "README.md", folder / "index.html"
    gallery = page.pictures(folder / TRIGGERS) if (folder / TRIGGERS).is_dir() else ()
    return {
        readme: _readme(folder, records).encode(),
        html: page.render(records, page.links(sorted(files), html), gallery).encode(),
    }


def index(boards: Path, more: Mapping[Path, Record] = NONE) -> bytes:
    """The list of the boards in a folder, as Markdown. ``more`` as in ``render``."""
    lines = []
    places = {*boards.glob("*/records"), *(path.parent for path in more)}
    for folder in sorted(place.parent for place in places):
        own = {path: record for path, record in more.items() if folder in path.parents}
        records = in_order({**read_files(folder), **own}.values())
        cells = [record.cell for record in records]
        shares = sorted({cell.benign_fraction for cell in cells})
        title = _opening(folder).partition("\n")[0].lstrip("# ")
        found = {
            "board": f"[{table.markdown_text(title)}]({folder.name}/README.md)",
            "page": f"[page]({folder.name}/index.html)",
            "benign images": ", ".join(f"{100 * share:.3g} %" for share in shares),
            "attacks": len({cell.attack["name"] for cell in cells} - {CONTROL}),
            "defenses": len({cell.defense["name"] for cell in cells} - {UNDEFENDED}),
            "seeds": ", ".join(map(str, sorted({cell.seed for cell in cells}))),
            "records": f"{len(cells):,}",
            "hours": f"{_seconds(records) / 3600:.1f}",
        }
        lines.append(found)
    text = tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)
    opening = (
        "# Boards\n\nEach made from its records, by `python bench.py publish`. hours: of training "
        "and defending, as they were measured; evaluation and reactivation come on top."
    )
    return f"{opening}\n\n{text}\n".encode()


def _seconds(records: Sequence[Record]) -> float:
    """Of all trainings, each victim's once, and defenses."""
    trainings = {record.victim: record.cost.get("training_seconds", 0.0) for record in records}
    defenses = (record.cost.get("seconds", 0.0) for record in records)
    return float(sum(trainings.values()) + sum(defenses))


def write(folder: Path, more: Mapping[Path, Record] = NONE) -> list[Path]:
    """Write ``more``, what ``render`` gives, and the list above it anew; where these two are.

    Nothing is written before all is rendered.
    """
    files = {**render(folder, more), folder.parent / "README.md": index(folder.parent, more)}
    need_writable(folder)
    for path, record in more.items():
        record.write(path)
    for path, content in files.items():
        write_atomic(path, content)
    return list(files)


def _readme(folder: Path, records: Sequence[Record]) -> str:
    defended = any(record.cell.defense["name"] != UNDEFENDED for record in records)
    text = table.markdown(records) if defended else undefended.markdown(records)
    return (
        f"{_opening(folder)}\n\nMade by `python bench.py publish {folder.name}` from the "
        f"{len(records):,} records in [records](records); the same tables, sortable, with charts, "
        f"are in [index.html](index.html).\n\n{_earlier(records)}{text}"
    )


def _earlier(records: Iterable[Record]) -> str:
    """Whose results the code beside the board would no longer give."""
    from purebench import ATTACKS, DEFENSES  # and torch with them: what only draws does without

    found: dict[str, str] = {}
    for record in records:
        for registry, plugin in ((ATTACKS, record.cell.attack), (DEFENSES, record.cell.defense)):
            name, then = plugin["name"], plugin.get("revision", 1)
            if name in registry and registry[name].revision > then:
                found[name] = f"{name} (revision {then}, now {registry[name].revision})"
    if not found:
        return ""
    told = ", ".join(found[name] for name in sorted(found))
    return f"Measured before these were changed, and not yet again: {told}.\n\n"


def _opening(folder: Path) -> str:
    about = folder / "about.md"
    return about.read_text("utf-8").strip() if about.is_file() else f"# {folder.name}"
