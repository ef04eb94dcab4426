"""Commands: one module each, named for its word on the command line and imported when called.

Its ``main`` takes the words behind that one and returns the exit code. Its docstring's first
paragraph, "word ARGUMENTS: what it is for.", is what ``--help`` says of it. At its top it imports
only what is there at once (no torch, no SciPy); the rest comes after its options have been read.
"""

from __future__ import annotations

import textwrap
from importlib import import_module
from types import ModuleType

OK, FAILED = 0, 1

COMMANDS = (  # as --help lists them
    "run",
    "list",
    "leaderboard",
    "sweep",
    "show",
    "publish",
    "submit",
    "verify",
    "doctor",
    "recovery",
    "purify",
    "evaluate",
)


def load(command: str) -> ModuleType:
    return import_module(f"{__name__}.{command}")


def purposes() -> str:
    """A line or two on each command."""
    return "\n".join(_purpose(load(command).__doc__ or command) for command in COMMANDS)


def _purpose(docstring: str) -> str:
    usage, _, text = " ".join(docstring.split("\n\n")[0].split()).partition(": ")
    first = f"  {usage:<22} "
    return textwrap.fill(
        text.removesuffix("."), 100, initial_indent=first, subsequent_indent=" " * len(first)
    )
