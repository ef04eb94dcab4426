"""Board: a folder of records beside the table and the page that they give, for publishing.

``records/`` holds the records, ``about.md``, where there is one, what a reader should know first.
``README.md`` and ``index.html`` follow from these alone, so that a test can hold them to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from purebench.record import Record, read_record, read_records
from purebench.storage import write_atomic

from . import page, table, undefended
from .rows import UNDEFENDED

TRIGGERS = "triggers"


def add(folder: Path, records: Iterable[Record]) -> int:
    """Write records to a board. One of the same cell gives way, but for one of our own to what
    somebody else reports. How many were written."""
    count = 0
    for record in records:
        cell = record.cell
        words = cell.dataset["name"], cell.model["name"], cell.attack["name"], cell.defense["name"]
        name = re.sub(r"[^A-Za-z0-9_-]", "_", "-".join(map(str, words)))[:100]
        fingerprint = re.sub(r"[^0-9a-f]", "", record.fingerprint)[:64]
        path = folder / "records" / f"{name}-s{cell.seed}-{fingerprint}.json"
        if record.provenance and path.is_file() and not read_record(path).provenance:
            continue
        record.write(path)
        count += 1
    return count


def render(folder: Path) -> dict[Path, bytes]:
    """What belongs into the board's README.md and index.html; equal records, equal bytes.

    ImportError: Jinja2 is not installed; ``page.REMEDY`` installs it.
    """
    records = read_records([folder])
    readme, html = folder / "README.md", folder / "index.html"
    gallery = page.pictures(folder / TRIGGERS) if (folder / TRIGGERS).is_dir() else ()
    return {
        readme: _readme(folder, records).encode(),
        html: page.render(records, page.links([folder], html), gallery).encode(),
    }


def write(folder: Path) -> list[Path]:
    """Write what ``render`` gives; where that is."""
    files = render(folder)
    for path, content in files.items():
        write_atomic(path, content)
    return list(files)


def _readme(folder: Path, records: Sequence[Record]) -> str:
    about = folder / "about.md"
    defended = any(record.cell.defense["name"] != UNDEFENDED for record in records)
    text = table.markdown(records) if defended else undefended.markdown(records)
    opening = about.read_text("utf-8").strip() if about.is_file() else f"# {folder.name}"
    return (
        f"{opening}\n\nMade by `python bench.py publish {folder.name}` from the "
        f"{len(records):,} records in [records](records); the same tables, sortable, with charts, "
        f"are in [index.html](index.html).\n\n{text}"
    )
