"""run: the default: attack, defend, judge, print the leaderboard."""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..config import RunConfig, config_fields
from ..storage import write_atomic
from . import OK, _failures, _terminal, purposes
from ._options import Parser, add_options, run_config

if TYPE_CHECKING:
    from ..record import Record

_EXAMPLES = """\
examples:
  python bench.py --attack blend
  python bench.py --attack blend badnets --defense fine_tune robust_recovery --seeds 0 1 2
  python bench.py --attack blend --set blend.alpha=0.1 --poison-rate 0.05
  python bench.py --dataset cifar10 --model preact_resnet18 --attack badnets --device cuda
"""


def main(words: list[str]) -> int:
    parser = _parser()
    if not words:
        parser.print_help()
        return OK
    return _execute(run_config(parser.read(words)))


def _parser() -> Parser:
    parser = Parser(
        prog="bench.py",
        description="Backdoor attacks and defenses for image classifiers, measured.",
        epilog=f"commands:\n{purposes()}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"purebench {__version__}")
    parser.add_argument("--config", metavar="FILE.yaml", help="the same options, from a file")
    add_options(parser, config_fields())
    return parser


def _execute(config: RunConfig) -> int:
    from ..interrupt import deferred
    from ..progress import Progress
    from ..runner import execute, prepare

    progress = Progress(config.quiet)
    plan = prepare(config, progress)
    paths: list[Path] = []
    told: set[tuple[str, int]] = set()

    def done(record: Record, path: Path, reused: bool) -> None:
        paths.append(path)
        cell = record.cell
        victim = (cell.attack["name"], cell.seed)
        if victim not in told and record.before is not None:
            told.add(victim)
            progress.say(
                f"{victim[0]}, seed {victim[1]}: undefended ACC {record.before.acc:.2%}"
                + (f", ASR {record.before.asr:.2%}" if victim[0] != "none" else "")
                + f" (trained once, in {record.cost['training_seconds']:.1f} s)"
            )
        progress.say(f"  [{len(paths)}/{plan.cell_count}] {_verdict(record, reused)}")

    with deferred():
        records = list(execute(plan, done))
    _tell(records, paths, plan.output)
    return _failures.tell(records)


def _verdict(record: Record, reused: bool) -> str:
    after = record.after
    if record.status != "ok" or after is None:
        text = f"{record.status}: {record.error}"
    else:
        text = f"ACC {after.acc:.2%}, ASR {after.asr:.2%}, RA {after.ra:.2%}"
        if record.reactivated is not None:
            text += f", reactivated ASR {record.reactivated.asr:.2%}"
    return f"{record.cell.defense['name']}: {text}" + (" (from the cache)" if reused else "")


def _tell(records: list[Record], paths: list[Path], output: Path) -> None:
    table = import_module("purebench.leaderboards.table")
    cells = [record.cell for record in records]
    attacks = "+".join(dict.fromkeys(cell.attack["name"] for cell in cells))
    stem = f"{cells[0].dataset['name']}-{cells[0].model['name']}-{attacks}"[:120]
    print(f"\n{table.screen(records, width=_terminal.width())}\n")
    print(f"records   {paths[0].parent}{os.sep} ({len(paths)} files)")
    for kind, render, ending in (
        ("Markdown", table.markdown, "md"),
        ("CSV", table.as_csv, "csv"),
        ("JSON", table.as_json, "json"),
    ):
        path = output / "tables" / f"{stem}.{ending}"
        write_atomic(path, render(records).encode())
        print(f"{kind:<9} {path}")
