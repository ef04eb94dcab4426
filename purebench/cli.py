"""Command line: ``python bench.py --attack blend``, and the commands beside it."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_origin, get_type_hints

from . import __version__
from .config import SWEPT, RunConfig, config_fields, parse_set, read_config, read_sweep
from .errors import UsageError, near_match
from .registry import REGISTRIES, load_plugin
from .settings import convert

if TYPE_CHECKING:
    from .record import Record

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

_EPILOG = """\
commands:
  run                    the default: attack, defend, judge, print the leaderboard
  list                   attacks, defenses, models and datasets, with their papers
  leaderboard FOLDER     the tables of all records below a folder
  sweep FILE.yaml        many runs as one: lists of models, poison rates and benign shares
  show                   a picture of what an attack does to images
  publish BOARD FOLDER   copy records to a committed board and render its table and page
  submit FOLDER          pack records for somebody else's board
  verify FILE            check such a package field by field, and run one of its cells again
  doctor                 versions, device, disk, data, and a self-check of repeatability
  recovery               how many wrong weights robust recovery can undo: the theory, tested, or
                         with --contaminate MODEL a trained network
  purify                 repair a model of your own with benign images: docs/purify.md
  evaluate               ACC, ASR and RA of a model of your own, for who has the trigger

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
    commands = {
        "run": _run,
        "list": _list,
        "leaderboard": _leaderboard,
        "show": _show,
        "publish": _publish,
        "submit": _submit,
        "verify": _verify,
        "sweep": _sweep,
        "doctor": _doctor,
        "recovery": _recovery,
        "purify": _purify,
        "evaluate": _evaluate,
    }
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
    _add_options(parser, config_fields())
    return parser


def _add_options(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    hints = get_type_hints(RunConfig)
    for name in names:
        option = config_fields()[name]
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


def _run(words: list[str]) -> int:
    parser = _parser()
    if not words:
        parser.print_help()
        return OK
    return _execute(_config(parser, words))


def _config(parser: _Parser, words: list[str]) -> RunConfig:
    options = parser.read(words)
    file = options.pop("config", None)
    if "set" in options:
        options["set"] = parse_set(options["set"])
    return read_config(file, options)


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
    _tell(records, paths, plan.output)
    return _failures(records)


def _failures(records: list[Record]) -> int:
    """Told on standard error; the exit code."""
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
        if record.reactivated is not None:
            text += f", reactivated ASR {record.reactivated.asr:.2%}"
    return f"{record.cell.defense['name']}: {text}" + (" (from the cache)" if reused else "")


def _tell(records: list[Record], paths: list[Path], output: Path) -> None:
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


def _leaderboard(words: list[str]) -> int:
    parser = _Parser(prog="bench.py leaderboard", allow_abbrev=False)
    parser.add_argument("folder", nargs="+", help="records are looked for here and below")
    kinds = ("screen", "markdown", "csv", "json", "latex")
    parser.add_argument("--format", choices=kinds, help="what is printed (default: screen)")
    parser.add_argument("--attack", nargs="+", default=[], help="print these only; also: mean")
    parser.add_argument("--columns", nargs="+", default=[], help="these only, e.g. acc asr der")
    parser.add_argument("--undefended", action="store_true", help="what attacks do, undefended")
    parser.add_argument("--page", metavar="FILE.html", help="write all boards as a page")
    parser.add_argument("--triggers", metavar="DIR", help="PNG files for the page's gallery")
    parser.add_argument("--figures", metavar="DIR", help="write figures for papers")
    options = parser.read(words)
    if options["triggers"] and not options["page"]:
        raise UsageError("--triggers is for --page FILE.html")
    if options["columns"] and options["format"] in ("csv", "json"):
        raise UsageError("--columns is for --format screen, markdown and latex")
    if options["undefended"] and (options["format"] or "screen") not in ("screen", "markdown"):
        raise UsageError("--undefended is for --format screen and markdown")

    from .record import read_records

    folders = [Path(folder) for folder in options["folder"]]
    records = read_records(folders)
    table = import_module("purebench.leaderboards.table")
    renders = {"csv": table.as_csv, "json": table.as_json}
    writes = options["page"] or options["figures"]
    kind = options["format"] or (None if writes else "screen")
    try:
        if options["undefended"]:
            undefended = import_module("purebench.leaderboards.undefended")
            print(getattr(undefended, kind or "screen")(records).rstrip("\n"))
        elif kind in renders:
            print(renders[kind](records, options["attack"]).rstrip("\n"))
        elif kind:
            text = getattr(table, kind)(records, options["attack"], options["columns"])
            print(text.rstrip("\n"))
        if options["page"]:
            page = import_module("purebench.leaderboards.page")
            page.write(records, folders, Path(options["page"]), options["triggers"])
            print(f"page      {options['page']}", file=sys.stderr)
        if options["figures"]:
            figures = import_module("purebench.leaderboards.figures")
            for path in figures.draw(records, Path(options["figures"])):
                print(f"figure    {path}", file=sys.stderr)
    except ValueError as error:  # records of two protocols, a gallery without pictures
        raise UsageError(str(error)) from error
    return OK


def _sweep(words: list[str]) -> int:
    parser = _Parser(
        prog="bench.py sweep",
        description="Work off every combination that a file names, with the clean control and "
        "reactivation. Finished cells are not run again.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.yaml", help="a run's options, some with lists")
    parser.add_argument("--dry-run", action="store_true", help="say what is left, and do nothing")
    parser.add_argument("--jobs", metavar="N", default="1", help="processes (default: 1)")
    _add_options(parser, [name for name in config_fields() if name not in (*SWEPT, "reactivate")])
    options = parser.read(words)
    file, dry_run = options.pop("file"), options.pop("dry_run", False)
    jobs = convert(options.pop("jobs"), int, "--jobs")
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    if "set" in options:
        options["set"] = parse_set(options["set"])
    configs = read_sweep(file, options)

    from .progress import Progress
    from .sweep import Sweep

    progress = Progress(configs[0].quiet)
    sweep = Sweep.of(configs, progress.without_bars())
    print(sweep.describe(jobs))
    if dry_run:
        return OK
    records = sweep.run(jobs, progress)
    print(f"records   {sweep.plans[0].output / 'records'}{os.sep} ({len(records)} files)")
    return _failures(records)


def _publish(words: list[str]) -> int:
    parser = _Parser(prog="bench.py publish", allow_abbrev=False)
    parser.add_argument("board", help="its name; without a source it is rendered again")
    parser.add_argument("source", nargs="*", help="folders of records, or a submission")
    for name in ("dataset", "model", "attack", "defense"):
        parser.add_argument(f"--{name}", nargs="+", default=[], help="copy these records only")
    parser.add_argument("--provenance", choices=("self-reported", "verified", "flagged"))
    parser.add_argument("--boards", default="leaderboards/published", metavar="DIR")
    options = parser.read(words)

    from .record import read_records
    from .storage import need_writable
    from .submission import unpack

    if "/" in options["board"] or options["board"].startswith("."):
        raise UsageError(f"a board's name is one folder's, got {options['board']!r}")
    folder = Path(options["boards"]) / options["board"]
    records: list[Record] = []
    for source in map(Path, options["source"]):
        if source.suffix != ".zip":
            records += read_records([source])
        elif options["provenance"] is None:
            raise UsageError(f"{source}: --provenance says how far it is believed; see verify")
        else:
            sent = unpack(source).records.values()
            records += [replace(record, provenance=options["provenance"]) for record in sent]
    chosen = [record for record in records if _wanted(record, options)]
    if options["source"] and not chosen:
        raise UsageError(f"none of the {len(records)} records there was chosen")
    need_writable(folder)
    board, page = (import_module(f"purebench.leaderboards.{name}") for name in ("board", "page"))
    count = board.add(folder, chosen)
    try:
        written = board.write(folder)
    except ImportError as error:
        raise UsageError(f"publish needs Jinja2: {page.REMEDY}") from error
    print(f"records   {folder / 'records'}{os.sep} ({count} written)")
    for path in written:
        print(f"board     {path}")
    return OK


def _wanted(record: Record, options: dict[str, Any]) -> bool:
    return all(
        not options[name] or getattr(record.cell, name)["name"] in options[name]
        for name in ("dataset", "model", "attack", "defense")
    )


def _submit(words: list[str]) -> int:
    parser = _Parser(prog="bench.py submit", allow_abbrev=False)
    parser.add_argument("folder", nargs="+", help="records are looked for here and below")
    parser.add_argument("--by", required=True, metavar="NAME", help="who sends it")
    parser.add_argument("--output", default="submission.zip", metavar="FILE.zip")
    options = parser.read(words)

    from .record import read_records
    from .storage import write_atomic
    from .submission import missing, pack

    folders = [Path(folder) for folder in options["folder"]]
    records = read_records(folders)
    files = [path for folder in folders for path in sorted(folder.rglob("*.json"))]
    contents = {path.name: path.read_bytes() for path in files if "records" in path.parts}
    lacking = missing(records)
    for line in lacking:
        print(f"missing   {line}", file=sys.stderr)
    if lacking:
        raise UsageError(f"{len(lacking)} cells that a leaderboard asks for are not there")
    write_atomic(Path(options["output"]), pack(contents, options["by"]))
    print(f"packed    {options['output']} ({len(contents)} records, no weights)")
    return OK


def _verify(words: list[str]) -> int:
    parser = _Parser(
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
    _add_options(parser, ("device", "threads", "data_root", "offline", "plugin", "quiet"))
    options = parser.read(words)
    file, cell, idle = (options.pop(name, None) for name in ("file", "cell", "no_run"))

    from .submission import missing, unpack

    sent = unpack(Path(file))
    print(f"sound     {len(sent.records)} records by {sent.by}: schema, protocol, digests, metrics")
    lacking = missing(list(sent.records.values()))
    for line in lacking:
        print(f"missing   {line}")
    if idle:
        print("verdict   " + ("not whole" if lacking else "self-reported"))
        return FAILED if lacking else OK
    name = cell or random.choice(sorted(sent.records))
    if name not in sent.records:
        raise UsageError(f"no record {name!r} there{near_match(name, sent.records)}")
    found = _again(sent.records[name], read_config(None, options))
    print(f"again     {name}")
    for line in found:
        print(f"differs   {line}")
    verdict = "flagged" if found else "not whole" if lacking else "verified"
    print(f"verdict   {verdict}")
    return OK if verdict == "verified" else FAILED


def _again(record: Record, config: RunConfig) -> list[str]:
    """Measure a record's cell; what comes out otherwise than it says."""
    from .progress import Progress
    from .runner import execute, prepare
    from .submission import again, differences

    how = ("device", "threads", "data_root", "offline", "plugin", "quiet")
    with tempfile.TemporaryDirectory() as folder:
        given = {name: getattr(config, name) for name in how}
        plan = prepare(again(record, output=folder, **given), Progress(config.quiet))
        ours = plan.cell(plan.attacks[0], plan.defenses[0], record.cell.seed)
        foreign = [key for key, value in vars(ours).items() if value != vars(record.cell)[key]]
        if foreign:
            return [f"cell.{key}: not as this version has it" for key in foreign]
        return list(differences(record, next(execute(plan))))


def _show(words: list[str]) -> int:
    parser = _Parser(
        prog="bench.py show",
        description="Draw clean test images beside triggered ones, from the cached network of each "
        "attack and seed, or from one that is trained now.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="the same options, from a file")
    unused = ("defense", "reactivate")
    _add_options(parser, [name for name in config_fields() if name not in unused])
    config = replace(_config(parser, words), defense=("none",))

    from .gallery import page
    from .progress import Progress
    from .runner import Victim, prepare
    from .storage import need_writable, write_atomic

    plan = prepare(config, Progress(config.quiet))
    folder = plan.output / "figures"
    need_writable(folder)
    failed = False
    for seed in config.seeds:
        for attack in plan.attacks:
            path = folder / f"{attack.name}-s{seed}.png"
            try:
                write_atomic(path, page(Victim(plan, attack, seed)))
            except Exception as error:  # one attack's failure is not its neighbours'
                failed = True
                print(f"failed: {attack.name} / seed {seed}: {_words(error)}", file=sys.stderr)
            else:
                print(f"figure    {path}")
    return FAILED if failed else OK


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _doctor(words: list[str]) -> int:
    parser = _Parser(prog="bench.py doctor", allow_abbrev=False)
    parser.add_argument("--data-root", default="data", metavar="DIR")
    parser.add_argument("--output", default="results", metavar="DIR")
    parser.add_argument("--device", default="auto", metavar="NAME")
    options = parser.read(words)

    from .doctor import report

    well = report(Path(options["data_root"]), Path(options["output"]), options["device"])
    return OK if well else FAILED


def _recovery(words: list[str]) -> int:
    parser = _Parser(
        prog="bench.py recovery",
        description="How far sparse errors in weights can be undone: a grid on one-hidden-layer "
        "networks (seeds 0 and 1 unless given) with the claims of the theory, or --contaminate "
        "MODEL for a trained network (--attack none and seed 0 unless given).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--full", action="store_true", help="the fine grid, with every noise law")
    parser.add_argument("--contaminate", metavar="MODEL", help="instead: a trained network")
    network = parser.add_argument_group("with --contaminate")
    for flag, text in (("--noise", "laws (default: gaussian)"), ("--eps", "shares (default: 0.1)")):
        network.add_argument(flag, nargs="+", metavar=flag[2:].upper(), help=text)
    both = ("seeds", "output", "threads", "quiet")
    _add_options(parser, both)
    fields = ("attack", "dataset", "benign_fraction", "recipe", "device", "data_root", "plugin")
    _add_options(network, (*fields, "offline", "force", "set"))
    options = parser.read(words)
    model, full = options.pop("contaminate", None), options.pop("full", False)
    if model is None:
        foreign = [name for name in options if name not in both]
        if foreign:
            raise UsageError(f"--{foreign[0].replace('_', '-')} is for --contaminate MODEL")
        return _study(read_config(None, options), full, "seeds" in options)
    if full:
        raise UsageError("--full is for the study, without --contaminate")
    laws = tuple(options.pop("noise", ["gaussian"]))
    shares = convert(options.pop("eps", ["0.1"]), tuple[float, ...], "--eps")
    if "set" in options:
        options["set"] = parse_set(options["set"])
    return _contaminate(read_config(None, {**options, "model": model}), laws, shares)


def _study(config: RunConfig, full: bool, seeds_given: bool) -> int:
    import torch

    from . import study
    from .heatmap import REMEDY
    from .progress import Progress
    from .storage import need_writable

    folder = Path(config.output) / "recovery"
    need_writable(folder)
    torch.set_num_threads(config.threads)
    grid = study.FULL if full else study.QUICK
    if seeds_given:
        grid = replace(grid, seeds=config.seeds)
    found = study.run(grid, Progress(config.quiet))
    print(f"\n{found.table()}\n")
    _write_json(folder / "study.json", found.as_json())
    try:
        for path in found.draw(folder):
            print(f"figure    {path}")
    except ImportError:
        print(f"figure    none: matplotlib is not installed; {REMEDY}")
    return OK if all(claim.holds for claim in found.claims) else FAILED


def _contaminate(config: RunConfig, laws: tuple[str, ...], shares: tuple[float, ...]) -> int:
    from . import contamination
    from .progress import Progress

    plan = contamination.plan(config, laws, shares, Progress(config.quiet))
    found = contamination.measure(plan, laws, shares)
    print(f"\n{found.table()}\n")
    name = f"{config.dataset}-{config.model}-{'+'.join(laws)}.json"
    _write_json(plan.output / "recovery" / name, found.as_json())
    return OK


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from .storage import write_atomic

    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    print(f"JSON      {path}")


def _own_model(prog: str, description: str, fields: Sequence[str]) -> _Parser:
    """The options that purify and evaluate share."""
    parser = _Parser(
        prog=f"bench.py {prog}",
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="FILE", help=".safetensors, .pt, .pth")
    text = "a registered model (bench.py list), or torchvision.NAME"
    parser.add_argument("--architecture", required=True, metavar="NAME", help=text)
    for name in ("mean", "std"):
        text = "what images in [0, 1] are normalised with, where the file does not say"
        parser.add_argument(f"--{name}", nargs="+", metavar="X", help=text)
    parser.add_argument("--seed", metavar="N", help="of all that is random (default: 0)")
    common = ("device", "threads", "data_root", "plugin", "offline", "quiet", "set")
    _add_options(parser, (*fields, *common))
    return parser


def _own_options(options: dict[str, Any]) -> dict[str, Any]:
    """What is common to purify and evaluate, converted; the rest is a RunConfig."""
    own: dict[str, Any] = {"model": Path(options.pop("model"))}
    own["architecture"] = options.pop("architecture")
    for name, kind in (("mean", tuple[float, ...]), ("std", tuple[float, ...]), ("seed", int)):
        if name in options:
            own[name] = convert(options.pop(name), kind, f"--{name}")
    if "set" in options:
        options["set"] = parse_set(options["set"])
    return {**own, "config": read_config(None, options)}


def _purify(words: list[str]) -> int:
    parser = _own_model(
        "purify",
        "Repair a model with benign images, and measure what that costs. See docs/purify.md.",
        ("dataset", "benign_fraction", "recipe"),
    )
    parser.add_argument("--benign", metavar="PATH", help="folder of class folders, or .npz")
    parser.add_argument("--defense", metavar="NAME", help="(default: robust_recovery)")
    parser.add_argument("--output", required=True, metavar="FILE.safetensors")
    options = parser.read(words)
    foreign = {"dataset", "benign_fraction"} & set(options)
    if "benign" in options and foreign:
        raise UsageError(f"--{min(foreign).replace('_', '-')} and --benign: give one of them")
    if not foreign and "benign" not in options:
        raise UsageError("where are benign images? --benign FOLDER, or --dataset NAME to try it")
    given = {key: options.pop(key) for key in ("benign", "defense", "output") if key in options}
    given |= {key: Path(given[key]) for key in ("benign", "output") if key in given}

    from .progress import Progress
    from .purification import Files, purify_file

    files = Files(**given, **_own_options(options))
    try:
        found, card = purify_file(files, Progress(files.config.quiet))
    except UsageError:
        raise
    except Exception as error:  # a defense's, on a network that it was not written for
        print(f"failed: {files.defense}: {_words(error)}; nothing was written", file=sys.stderr)
        return FAILED
    for remark in card["remarks"]:
        print(f"remark    {remark}")
    print(f"{found.report()}\nmodel     {files.output}\ncard      {files.card}")
    return OK


def _evaluate(words: list[str]) -> int:
    parser = _own_model(
        "evaluate",
        "ACC, ASR and RA of a model on a dataset's test split, with an attack's trigger (as "
        "--seed draws it), an artifact's, or a picture's.",
        ("dataset", "target", "all_to_all"),
    )
    parser.add_argument("--attack", metavar="NAME", help="one whose trigger is fixed")
    text = "a folder of results/models, or a picture whose alpha says how far it covers"
    parser.add_argument("--trigger", metavar="PATH", help=text)
    options = parser.read(words)
    given = {key: options.pop(key) for key in ("attack", "trigger") if key in options}
    given |= {"trigger": Path(given["trigger"])} if "trigger" in given else {}
    if {"target", "all_to_all"} & set(options) and "trigger" in given and given["trigger"].is_dir():
        raise UsageError("--target and --all-to-all: an artifact's trigger has its own aim")

    from .examination import Question, examine
    from .progress import Progress

    question = Question(**given, **_own_options(options))
    scores, told = examine(question, Progress(question.config.quiet))
    interval = import_module("purebench.leaderboards.intervals").binomial_interval
    print(f"{question.config.dataset}: {told}")
    for name, right, count in (
        ("ACC", scores.clean_correct, scores.clean_count),
        ("ASR", scores.triggered_as_target, scores.triggered_count),
        ("RA", scores.triggered_as_true, scores.triggered_count),
    ):
        low, high = interval(right, count)
        print(f"{name:<9} {right / count:.2%}  {right} of {count} images, {low:.2%} to {high:.2%}")
    return OK
