"""sweep FILE.yaml: many runs as one: lists of models, poison rates and benign shares."""

from __future__ import annotations

import argparse
import os
import shlex
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from ..config import SWEPT, config_fields, parse_set, read_sweep
from ..errors import UsageError
from ..executors import EXECUTORS, SPLITTING, make_executor
from ..settings import convert
from . import OK, _failures, _terminal
from ._options import Parser, add_options

_OPTIONS = {  # of executors: how one is written, and what it is for
    "jobs": ("N", "workers of a pool, Slurm jobs at once; more than 1 without --executor: a pool"),
    "gpu_slots": ("K", "tasks that share a GPU, in a pool or with Ray (default: 1)"),
    "timeout": ("SECONDS", "kill a pool's cell that takes longer, its victim's training included"),
    "address": ("HOST:PORT", "Ray's, or auto; local starts it on this machine (default: local)"),
    "slurm": ("KEY=VALUE", "sbatch's options, e.g. partition=gpu time=240 gpus_per_node=1"),
}


def main(words: list[str]) -> int:
    for name in SWEPT:
        if f"--{name.replace('_', '-')}" in (word.partition("=")[0] for word in words):
            raise UsageError(
                f"of a sweep, {', '.join(SWEPT[:-1])} and {SWEPT[-1]} stand in its file"
            )
    options = _parser().read(words)
    file, dry_run = options.pop("file"), options.pop("dry_run", False)
    given = {name: options.pop(name) for name in _OPTIONS if name in options}
    for name in {"jobs", "gpu_slots"} & set(given):
        flag = f"--{name.replace('_', '-')}"
        given[name] = convert(given[name], int, flag)
        if given[name] < 1:
            raise UsageError(f"{flag} must be at least 1, got {given[name]}")
    if "timeout" in given:
        given["timeout"] = convert(given["timeout"], float, "--timeout")
        if given["timeout"] <= 0:
            raise UsageError(f"--timeout must be above 0, got {given['timeout']:g}")
    if "slurm" in given:
        given["slurm"] = dict(_pair(text) for text in given["slurm"])
    jobs = given.get("jobs", 1)
    name = options.pop("executor", None)
    if name is None or dry_run:  # a forecast is for as many as one likes, whatever the executor
        given.pop("jobs", None)
    if name is None:
        name = "serial"
        if jobs > 1 or "timeout" in given:
            name, given["jobs"] = "pool", jobs
    if "set" in options:
        options["set"] = parse_set(options["set"])
    configs = read_sweep(file, options)

    from ..interrupt import deferred
    from ..progress import Progress
    from ..sweep import Sweep

    progress = Progress(configs[0].quiet)
    executor = make_executor(name, **given)
    output = Path(configs[0].output)
    places = (*(output / part for part in ("models", "records", "tables")), output, *output.parents)
    absent = [place for place in places if not place.exists()]
    sweep = Sweep.of(configs, progress.without_bars())
    print(sweep.describe(jobs, name in SPLITTING))
    if dry_run:
        for place in absent:  # made to see that it can be
            with suppress(OSError):
                place.rmdir()
        return OK
    with deferred():
        records = sweep.run(executor, progress)
    table = import_module("purebench.leaderboards.table")
    print(f"\n{table.summary(records, _terminal.width())}\n")
    print(f"records   {output / 'records'}{os.sep} ({len(records)} files)")
    print(f"tables    python bench.py leaderboard {shlex.quote(str(output))}")
    return _failures.tell(records)


def _parser() -> Parser:
    parser = Parser(
        prog="bench.py sweep",
        description="Work off every combination that a file names, with the clean control and "
        "reactivation. Finished cells are not run again.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.yaml", help="a run's options, some with lists")
    parser.add_argument("--dry-run", action="store_true", help="say what is left, and do nothing")
    parser.add_argument("--executor", choices=EXECUTORS, help="what does it (default: serial)")
    for name, (metavar, text) in _OPTIONS.items():
        more: dict[str, Any] = {"action": "extend", "nargs": "+"} if name == "slurm" else {}
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=text, **more)
    add_options(parser, [name for name in config_fields() if name not in (*SWEPT, "reactivate")])
    return parser


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UsageError(f"--slurm {text!r} must have the form KEY=VALUE")
    return key, value
