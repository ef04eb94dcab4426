"""Command line: ``python bench.py --attack blend``, ``list``, ``doctor``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_origin, get_type_hints

from . import __version__
from .config import RunConfig, config_fields, parse_set, read_config
from .errors import UsageError, near_match
from .registry import REGISTRIES, load_plugin

if TYPE_CHECKING:
    from .record import Record

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

_EPILOG = """\
commands:
  run                    the default: attack, defend, judge, print the leaderboard
  list                   attacks, defenses, models and datasets, with their papers
  doctor                 versions, device, disk, data, and a self-check of repeatability

examples:
  python bench.py --attack blend
  python bench.py --attack blend badnets --defense fine_tune robust_recovery --seeds 0 1 2
  python bench.py --attack blend --set blend.alpha=0.1 --poison-rate 0.05
  python bench.py --dataset cifar10 --model preact_resnet18 --attack badnets --device cuda
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def read(self, words: list[str]) -> dict[str, Any]:
        """Option -> value. UsageError for what is no option, with the near match."""
        options, rest = self.parse_known_args(words)
        if rest:
            word = rest[0].partition("=")[0]
            if not word.startswith("-"):
                raise UsageError(f"unexpected {word!r}: it belongs to no option")
            raise UsageError(
                f"unknown option {word!r}{near_match(word, self._option_string_actions)}"
            )
        return vars(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table is worth more than its arrows
    try:
        try:
            return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # here, where a reader who has gone is dealt with
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(
            "interrupted: finished cells are kept; the same command goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _dispatch(words: list[str]) -> int:
    commands = {"run": _run, "list": _list, "doctor": _doctor}
    command = words.pop(0) if words and not words[0].startswith("-") else "run"
    if command not in commands:
        raise UsageError(f"unknown command {command!r}{near_match(command, commands)}")
    return commands[command](words)


def _parser() -> _Parser:
    parser = _Parser(
        prog="bench.py",
        description="Backdoor attacks and defenses for image classifiers, measured.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"purebench {__version__}")
    parser.add_argument("--config", metavar="FILE.yaml", help="the same options, from a file")
    hints = get_type_hints(RunConfig)
    for name, option in config_fields().items():
        flag, kind = f"--{name.replace('_', '-')}", hints[name]
        shared: dict[str, Any] = {"dest": name, "help": option.metadata["help"]}
        if kind is bool:
            parser.add_argument(flag, action="store_true", **shared)
            continue
        shared["metavar"] = option.metadata.get("metavar") or "NAME"
        if name == "set" or get_origin(kind) is tuple:
            parser.add_argument(flag, action="extend", nargs="+", **shared)
        else:
            parser.add_argument(flag, **shared)
    return parser


def _run(words: list[str]) -> int:
    parser = _parser()
    if not words:
        parser.print_help()
        return OK
    options = parser.read(words)
    file = options.pop("config", None)
    if "set" in options:
        options["set"] = parse_set(options["set"])
    return _execute(read_config(file, options))


def _execute(config: RunConfig) -> int:
    from .progress import Progress
    from .runner import execute, prepare

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
                f"{victim[0]}, seed {victim[1]}: undefended ACC {record.before.acc:.2%}, "
                f"ASR {record.before.asr:.2%}"
                + (f", trained in {record.cost['training_seconds']:.1f} s" if not reused else "")
            )
        progress.say(f"  [{len(paths)}/{plan.cell_count}] {_verdict(record, reused)}")

    records = list(execute(plan, done))
    _publish(records, paths, plan.output)
    failed = [record for record in records if record.status in ("failed", "diverged")]
    for record in failed:
        print(f"{record.status}: {record.cell}: {record.error}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(records)} cells did not finish", file=sys.stderr)
    return FAILED if failed else OK


def _verdict(record: Record, reused: bool) -> str:
    after = record.after
    if record.status != "ok" or after is None:
        text = f"{record.status}: {record.error}"
    else:
        text = f"ACC {after.acc:.2%}, ASR {after.asr:.2%}, RA {after.ra:.2%}"
    return f"{record.cell.defense['name']}: {text}" + (" (from the cache)" if reused else "")


def _publish(records: list[Record], paths: list[Path], output: Path) -> None:
    from .storage import write_atomic

    table = import_module("purebench.leaderboards.table")
    cells = [record.cell for record in records]
    attacks = "+".join(dict.fromkeys(cell.attack["name"] for cell in cells))
    stem = f"{cells[0].dataset['name']}-{cells[0].model['name']}-{attacks}"[:120]
    print(f"\n{table.screen(records)}\n")
    print(f"records   {paths[0].parent}{os.sep} ({len(paths)} files)")
    for path in paths:
        print(f"            {path.name}")
    for kind, render, ending in (
        ("Markdown", table.markdown, "md"),
        ("CSV", table.as_csv, "csv"),
        ("JSON", table.as_json, "json"),
    ):
        path = output / "tables" / f"{stem}.{ending}"
        write_atomic(path, render(records).encode())
        print(f"{kind:<9} {path}")


def _list(words: list[str]) -> int:
    parser = _Parser(prog="bench.py list", allow_abbrev=False)
    parser.add_argument("--plugin", nargs="+", default=[], metavar="FILE.py")
    for file in parser.read(words)["plugin"]:
        load_plugin(file)
    for registry in REGISTRIES:
        print(f"{registry.folder}:")
        for name in registry.names():
            plugin = registry[name]
            print(f"  {name:<18} {_first_line(plugin)}")
            if plugin.paper:
                print(f"  {'':<18} [{plugin.paper}]")
    return OK


def _first_line(plugin: type[Any]) -> str:
    """What a plug-in does: its module's first line, without the name in front."""
    module = (sys.modules[plugin.__module__].__doc__ or "").strip()
    own = (plugin.__doc__ or "").strip()
    if not module and own.startswith(f"{plugin.__name__}("):
        return ""  # dataclass wrote it, not the author
    line = " ".join((module or own).split("\n\n")[0].split())
    _, colon, rest = line.partition(": ")
    return rest if colon and module else line


def _doctor(words: list[str]) -> int:
    parser = _Parser(prog="bench.py doctor", allow_abbrev=False)
    parser.add_argument("--data-root", default="data", metavar="DIR")
    parser.add_argument("--output", default="results", metavar="DIR")
    parser.add_argument("--device", default="auto", metavar="NAME")
    options = parser.read(words)

    from .doctor import report

    well = report(Path(options["data_root"]), Path(options["output"]), options["device"])
    return OK if well else FAILED
