"""verify FILE: check a submission field by field, and run one of its cells again."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import RunConfig
from ..errors import UsageError, near_match, plain
from ..registry import load_plugin
from . import FAILED, OK
from ._options import Parser, add_options, run_config

if TYPE_CHECKING:
    from ..record import Record


def main(words: list[str]) -> int:
    parser = Parser(
        prog="bench.py verify",
        description="Check a submission, and run one of its cells again (chosen at random, unless "
        "named). Exit code 0: verified, or sound where --no-run; 1: flagged or not whole; 2: no "
        "submission.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.zip")
    parser.add_argument("--cell", metavar="NAME", help="the record to run again")
    parser.add_argument("--no-run", action="store_true", help="run nothing again")
    add_options(parser, ("device", "threads", "data_root", "offline", "plugin", "quiet"))
    options = parser.read(words)
    file, cell, idle = (options.pop(name, None) for name in ("file", "cell", "no_run"))

    if cell and idle:
        raise UsageError("--cell names what is run again, and --no-run runs nothing again")

    from ..forecast import duration
    from ..submission import contradictions, missing, unpack

    sent = unpack(Path(file))
    by, records = plain(sent.by), list(sent.records.values())
    print(f"sound     {len(records)} records by {by}: schema, protocol, digests, metrics")
    lacking, torn = missing(records), contradictions(records)
    for line in lacking:
        print(f"missing   {plain(line)}")
    for line in torn:
        print(f"differs   {plain(line)}: its records do not agree")
    if idle:
        verdict = "flagged" if torn else "not whole" if lacking else "self-reported"
        print(f"verdict   {verdict}")
        return OK if verdict == "self-reported" else FAILED
    known = {Path(name).stem: name for name in sent.records}
    if cell and Path(cell).stem not in known:
        raise UsageError(f"no record {cell!r} there{near_match(cell, known)}")
    name = known[Path(cell).stem] if cell else random.choice(_telling(sent.records))
    cost = sent.records[name].cost
    taken = duration(sum(cost.get(part, 0.0) for part in ("training_seconds", "seconds")))
    print(f"again     {plain(name)} (it took its sender {taken})", flush=True)
    found = _again(sent.records[name], run_config(options))
    for line in found:
        print(f"differs   {plain(line)}")
    verdict = "flagged" if found or torn else "not whole" if lacking else "verified"
    print(f"verdict   {verdict}")
    return OK if verdict == "verified" else FAILED


def _telling(records: Mapping[str, Record]) -> list[str]:
    """Those that say something of a defense; their undefended networks are measured with them."""
    names = sorted(records)
    return [name for name in names if records[name].cell.defense["name"] != "none"] or names


def _again(record: Record, config: RunConfig) -> list[str]:
    """Measure a record's cell; what comes out otherwise than it says."""
    from ..progress import Progress
    from ..runner import execute, prepare
    from ..submission import again, differences, foreign_files

    for file in config.plugin:
        load_plugin(file)
    if found := list(foreign_files(record)):
        return found
    how = ("device", "threads", "data_root", "offline", "plugin", "quiet")
    with tempfile.TemporaryDirectory() as folder:
        given = {name: getattr(config, name) for name in how}
        plan = prepare(again(record, output=folder, **given), Progress(config.quiet))
        ours = plan.cell(plan.attacks[0], plan.defenses[0], record.cell.seed)
        foreign = [key for key, value in vars(ours).items() if value != vars(record.cell)[key]]
        if foreign:
            return [f"cell.{key}: not as this version has it" for key in foreign]
        return list(differences(record, next(execute(plan))))
