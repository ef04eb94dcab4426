"""submit FOLDER: pack records for somebody else's board."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import UsageError
from ..storage import write_atomic
from . import OK
from ._options import Parser


def main(words: list[str]) -> int:
    parser = Parser(prog="bench.py submit", allow_abbrev=False)
    parser.add_argument("folder", nargs="+", help="records are looked for here and below")
    parser.add_argument("--by", required=True, metavar="NAME", help="who sends it")
    parser.add_argument("--output", default="submission.zip", metavar="FILE.zip")
    options = parser.read(words)

    from ..record import read_records, record_files
    from ..submission import missing, pack

    folders = [Path(folder) for folder in options["folder"]]
    records = read_records(folders)
    files = [path for folder in folders for path in record_files(folder)]
    contents = {path.name: path.read_bytes() for path in files}
    lacking = missing(records)
    for line in lacking:
        print(f"missing   {line}", file=sys.stderr)
    if lacking:
        raise UsageError(f"{len(lacking)} cells that a leaderboard asks for are not there")
    write_atomic(Path(options["output"]), pack(contents, options["by"]))
    print(f"packed    {options['output']} ({len(contents)} records, no weights)")
    return OK
