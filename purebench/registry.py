"""Registry: names to plug-in classes, found by the files that are there.

A plug-in's registered name is its file's name, so names are known without importing anything;
the file itself is imported when it is first asked for. Three places are looked at: the plug-in
folder, the entry-point group ``purebench.<folder>`` of installed packages, and files given with
``--plugin``.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .errors import UsageError, near_match

if TYPE_CHECKING:
    from .attack import Attack
    from .data import Dataset
    from .defense import Defense
    from .model import Architecture

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registry(Generic[T]):
    """The plug-ins of one kind: ``registry[name]`` is a class, ``registry.names()`` all names."""

    def __init__(self, kind: str, folder: str) -> None:
        self.kind = kind
        self.folder = folder
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator. ``name`` is lower-case letters, digits and underscores.

        Raises UsageError for a malformed name and for one that another class holds.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{self.kind} name {name!r} must be lower-case letters, digits and underscores"
            )

        def enter(cls: C) -> C:
            held = self._classes.get(name)
            if held is not None and held.__module__ != cls.__module__:
                raise UsageError(
                    f"two {self.folder} are named {name!r}: {held.__module__} and {cls.__module__}"
                )
            cls.name = name
            self._classes[name] = cls
            return cls

        return enter

    def names(self) -> tuple[str, ...]:
        """All names, sorted; imports none of the plug-ins."""
        return tuple(sorted({*self._classes, *self._modules(), *self._entry_points()}))

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            if name in self._modules():
                import_module(f"purebench.{self.folder}.{name}")
            elif name in self._entry_points():
                self._entry_points()[name].load()
            else:
                raise UsageError(f"unknown {self.kind} {name!r}{near_match(name, self.names())}")
            if name not in self._classes:
                raise UsageError(
                    f"the {self.kind} plug-in {name!r} registers no class under its file's name"
                )
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def _modules(self) -> set[str]:
        spec = importlib.util.find_spec(f"purebench.{self.folder}")
        places = spec.submodule_search_locations if spec else None
        found = {module.name for module in pkgutil.iter_modules(places or [])}
        return {name for name in found if not name.startswith("_")}

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"purebench.{self.folder}")}


ATTACKS: Registry[Attack] = Registry("attack", "attacks")
DEFENSES: Registry[Defense] = Registry("defense", "defenses")
MODELS: Registry[Architecture] = Registry("model", "models")
DATASETS: Registry[Dataset] = Registry("dataset", "datasets")

REGISTRIES: tuple[Registry[Any], ...] = (ATTACKS, DEFENSES, MODELS, DATASETS)


def load_plugin(path: str | Path) -> None:
    """Import a plug-in from a file of the user's, as ``--plugin`` does.

    Raises UsageError where the file is missing or cannot be imported.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--plugin {str(path)!r}: no such file")
    module_name = f"purebench_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--plugin {str(path)!r}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        if isinstance(error, UsageError):
            raise
        reason = " ".join(str(error).split())
        raise UsageError(f"--plugin {str(path)!r}: {type(error).__name__}: {reason}") from error
