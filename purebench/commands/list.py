"""list: attacks, defenses, models and datasets, with their papers."""

from __future__ import annotations

import sys
from typing import Any

from ..registry import REGISTRIES, load_plugin
from . import OK
from ._options import Parser


def main(words: list[str]) -> int:
    parser = Parser(prog="bench.py list", allow_abbrev=False)
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
