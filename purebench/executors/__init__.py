"""Executors: ways to work off a sweep, one module each, imported when asked for.

Its class, an ``Executor``, is a dataclass; its fields are the options that it takes.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..sweep import Executor

EXECUTORS = {"serial": "Serial", "pool": "Pool", "ray": "Ray", "slurm": "Slurm"}
SPLITTING = ("ray", "slurm")  # have several workers on one victim


def make_executor(name: str, **options: Any) -> Executor:
    """UsageError for an option that it does not take, and for a missing package."""
    try:
        module = import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"executor {name} needs {error.name}, which is not installed: "
            f'pip install -e ".[{name}]"'
        ) from error
    kind = getattr(module, EXECUTORS[name])
    known = {field.name for field in fields(kind)}
    for option in options:
        if option not in known:
            raise UsageError(f"--{option.replace('_', '-')} is nothing to executor {name}")
    executor: Executor = kind(**options)
    return executor
