"""sweep FILE.yaml: many runs as one: lists of models, poison rates and benign shares."""

from __future__ import annotations

import argparse
import os

from ..config import SWEPT, config_fields, parse_set, read_sweep
from ..errors import UsageError
from ..settings import convert
from . import OK, _failures
from ._options import Parser, add_options


def main(words: list[str]) -> int:
    parser = Parser(
        prog="bench.py sweep",
        description="Work off every combination that a file names, with the clean control and "
        "reactivation. Finished cells are not run again.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.yaml", help="a run's options, some with lists")
    parser.add_argument("--dry-run", action="store_true", help="say what is left, and do nothing")
    parser.add_argument("--jobs", metavar="N", default="1", help="processes (default: 1)")
    add_options(parser, [name for name in config_fields() if name not in (*SWEPT, "reactivate")])
    options = parser.read(words)
    file, dry_run = options.pop("file"), options.pop("dry_run", False)
    jobs = convert(options.pop("jobs"), int, "--jobs")
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    if "set" in options:
        options["set"] = parse_set(options["set"])
    configs = read_sweep(file, options)

    from ..progress import Progress
    from ..sweep import Sweep

    progress = Progress(configs[0].quiet)
    sweep = Sweep.of(configs, progress.without_bars())
    print(sweep.describe(jobs))
    if dry_run:
        return OK
    records = sweep.run(jobs, progress)
    print(f"records   {sweep.plans[0].output / 'records'}{os.sep} ({len(records)} files)")
    return _failures.tell(records)
