"""doctor: versions, device, disk, data, and a self-check of repeatability."""

from __future__ import annotations

from pathlib import Path

from . import FAILED, OK
from ._options import Parser


def main(words: list[str]) -> int:
    parser = Parser(prog="bench.py doctor", allow_abbrev=False)
    parser.add_argument("--data-root", default="data", metavar="DIR")
    parser.add_argument("--output", default="results", metavar="DIR")
    parser.add_argument("--device", default="auto", metavar="NAME")
    options = parser.read(words)

    from ..doctor import report

    well = report(Path(options["data_root"]), Path(options["output"]), options["device"])
    return OK if well else FAILED
