"""show: a picture of what an attack does to images."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from ..config import config_fields
from ..storage import need_writable, write_atomic
from . import FAILED, OK
from ._failures import in_words
from ._options import Parser, add_options, run_config


def main(words: list[str]) -> int:
    parser = Parser(
        prog="bench.py show",
        description="Draw clean test images beside triggered ones, from the cached network of each "
        "attack and seed, or from one that is trained now; several attacks also beside each other.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="the same options, from a file")
    unused = ("defense", "reactivate")
    add_options(parser, [name for name in config_fields() if name not in unused])
    config = replace(run_config(parser.read(words)), defense=("none",))

    from ..gallery import Row, overview, page, rows
    from ..progress import Progress
    from ..runner import Victim, prepare

    plan = prepare(config, Progress(config.quiet))
    folder = plan.output / "figures"
    need_writable(folder)
    failed = False
    for seed in config.seeds:
        shown: dict[str, list[Row]] = {}
        for attack in plan.attacks:
            path = folder / f"{attack.name}-s{seed}.png"
            try:
                victim = Victim(plan, attack, seed)
                shown[attack.name] = rows(victim)
                write_atomic(path, page(victim, shown[attack.name]))
            except (Exception, SystemExit) as error:  # one attack's failure is not its neighbours'
                failed = True
                print(f"failed: {attack.name} / seed {seed}: {in_words(error)}", file=sys.stderr)
            else:
                print(f"figure    {path}")
        if len(shown) > 1:
            path = folder / f"overview-s{seed}.png"
            write_atomic(path, overview(shown, plan.dataset.name))
            print(f"figure    {path}")
    return FAILED if failed else OK
