"""Options: what a command line may say, and the run that it describes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, get_origin, get_type_hints

from ..config import RunConfig, config_fields, parse_set, read_config
from ..errors import UsageError, near_match


class Parser(argparse.ArgumentParser):
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


def add_options(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    """Options of a run, by their names in RunConfig."""
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


def run_config(options: Mapping[str, Any]) -> RunConfig:
    """The run that options describe, over the file that --config names, if one does."""
    given = dict(options)
    file = given.pop("config", None)
    if "set" in given:
        given["set"] = parse_set(given["set"])
    return read_config(file, given)
