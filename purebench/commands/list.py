"""list NAME ...: attacks, defenses, models, datasets and recipes; of those named, the settings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError, near_match
from ..registry import REGISTRIES, load_plugin
from ..settings import build
from . import OK
from ._options import Parser

if TYPE_CHECKING:
    from ..training import Recipe


def main(words: list[str]) -> int:
    parser = Parser(prog="bench.py list", allow_abbrev=False)
    parser.add_argument("name", nargs="*", metavar="NAME", help="these, with their settings")
    parser.add_argument("--plugin", nargs="+", default=[], metavar="FILE.py")
    kinds = tuple(_COLUMNS)
    parser.add_argument("--table", choices=kinds, help="these alone, as a Markdown table")
    options = parser.read(words)
    if options["table"] and options["name"]:
        raise UsageError("--table is of all there are, and NAME of some")
    for file in options["plugin"]:
        load_plugin(file)

    from ..training import RECIPES

    known = [*(name for registry in REGISTRIES for name in registry.names()), *RECIPES]
    for name in options["name"]:
        if name not in known:
            raise UsageError(f"unknown name {name!r}{near_match(name, {*known})}")
    if options["table"]:
        print(_table(options["table"]))
        return OK
    if options["name"]:
        print("\n\n".join(text for name in options["name"] for text in _explained(name)))
        return OK
    width = max(map(len, known))
    for registry in REGISTRIES:
        print(f"{registry.folder}:")
        for name in registry.names():
            try:
                plugin = registry[name]
            except UsageError as error:
                print(f"  {name:<{width}} {error}")
                continue
            print(f"  {name:<{width}} {_first_line(plugin)}")
            if plugin.paper:
                print(f"  {'':<{width}} [{plugin.paper}]")
    print("recipes:")
    for name, recipe in RECIPES.items():
        print(f"  {name:<{width}} {_in_short(recipe)}")
    return OK


def _rate(attack: Any) -> str:
    return f"{attack.poison_rate:g}{' of the class' * attack.clean_label}"


def _needs(defense: Any) -> str:
    """What a defense is given besides benign images."""
    names = {"training_set": "poisoned training set", "init": "initial weights"}
    return ", ".join(names.get(need, "test split (a leak)") for need in sorted(defense.needs))


_COLUMNS: dict[str, dict[str, Callable[[Any], str]]] = {  # of --table, beside those of all kinds
    "attacks": {"poison rate": _rate},
    "defenses": {
        "besides benign images": _needs,
        "runs by default": lambda defense: "yes" if defense.default else "",
    },
}


def _table(kind: str) -> str:
    """All of a kind in Markdown, with its default settings; but ``none``, the control of both."""
    from tabulate import tabulate

    (registry,) = (registry for registry in REGISTRIES if registry.folder == kind)
    columns = _COLUMNS[kind]
    lines = []
    for name in registry.names():
        if name != "none":
            plugin = build(registry[name], {}, f"{registry.kind} {name}")
            title, does = _head(registry[name])
            told = [text(plugin) for text in columns.values()]
            lines.append([f"`{name}`", title, does.rstrip("."), *told, _linked(plugin.paper)])
    headings = [registry.kind, "name", "what it does", *columns, "paper"]
    return tabulate(lines, headings, tablefmt="pipe", disable_numparse=True)


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _in_short(recipe: Recipe) -> str:
    return (
        f"{recipe.epochs} epochs, batches of {recipe.batch_size}, lr {recipe.lr:g}, "
        f"{recipe.schedule}"
    )


def _explained(name: str) -> list[str]:
    """Whatever has this name: what it does, its paper, its settings."""
    from ..training import RECIPES

    found = []
    for registry in REGISTRIES:
        if name in registry:
            plugin = registry[name]
            title, does = _head(plugin)
            lines = [f"{name} ({registry.kind}): {does}".rstrip(": ")]
            told = [title] * ("(" in title) + [f"[{plugin.paper}]"] * bool(plugin.paper)
            lines += [f"  {' '.join(told)}"] if told else []
            values = build(plugin, {}, f"{registry.kind} {name}")
            found.append("\n".join([*lines, *_settings(plugin, values)]))
    if name in RECIPES:
        recipe = RECIPES[name]
        lines = [f"{name} (recipe): {_in_short(recipe)}", *_settings(type(recipe), recipe)]
        found.append("\n".join(lines))
    return found


def _settings(cls: type[Any], values: Any) -> list[str]:
    """A line each, with its type and default; then what the docstring says of them."""
    hints = get_type_hints(cls)
    fields = [
        (field.name, _kind(hints[field.name]), _as_given(getattr(values, field.name)))
        for field in dataclasses.fields(cls)
    ]
    widths = [max(map(len, column)) for column in zip(*fields, strict=True)]
    lines = [
        f"  {name:<{widths[0]}}  {kind:<{widths[1]}}  {default}" for name, kind, default in fields
    ]
    if text := _docstring(cls):
        lines += ["", *(f"  {line}".rstrip() for line in text.split("\n"))]
    return lines


def _kind(annotation: Any) -> str:
    """A type in few words; of a Literal, what may be given."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_kind, arguments))
    if annotation is type(None):
        return "none"
    return str(annotation) if origin else annotation.__name__


def _as_given(value: Any) -> str:
    """As --set takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_as_given, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _docstring(cls: type[Any]) -> str:
    """As the author wrote it: a dataclass without one writes its own."""
    text = cls.__doc__ or ""
    return "" if text.startswith(f"{cls.__name__}(") else inspect.cleandoc(text)


def _first_line(plugin: type[Any]) -> str:
    """What a plug-in does."""
    return _head(plugin)[1]


def _head(plugin: type[Any]) -> tuple[str, str]:
    """A plug-in's name in words and what it does, from the first sentence of its module."""
    module = (sys.modules[plugin.__module__].__doc__ or "").strip()
    line = " ".join((module or _docstring(plugin)).split("\n\n")[0].split())
    title, colon, rest = line.partition(": ")
    return (title, rest) if colon and module else ("", line)
