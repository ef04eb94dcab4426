"""purify: repair a model of your own with benign images: docs/purify.md."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import UsageError
from . import FAILED, OK, _own_model
from ._failures import in_words


def main(words: list[str]) -> int:
    parser = _own_model.parser(
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

    from ..progress import Progress
    from ..purification import Files, purify_file

    files = Files(**given, **_own_model.settings(options))
    try:
        found, card = purify_file(files, Progress(files.config.quiet))
    except UsageError:
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # a defense's, on a network that it was not written for
        print(f"failed: {files.defense}: {in_words(error)}; nothing was written", file=sys.stderr)
        return FAILED
    for remark in card["remarks"]:
        print(f"remark    {remark}")
    print(f"{found.report()}\nmodel     {files.output}\ncard      {files.card}")
    return OK
