"""Registry: names to plug-in classes, found by the files that are there.

A plug-in's registered name is its file's name, so names are known without importing anything;
the file itself is imported when it is first asked for. Three places are looked at: the plug-in
folder, the entry-point group ``purebench.<folder>`` of installed packages, and files given with
``--plugin``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
TAKEN = ("rate", "revision")  # what tables say of an attack or defense beside its settings


class Registry(Generic[T]):
    """The plug-ins of one kind: ``registry[name]`` is a class, ``registry.names()`` all names."""

    def __init__(self, kind: str, folder: str, base: str) -> None:
        """base: what all of them are derived from, 'module:class'; imported by them, not here."""
        self.kind = kind
        self.folder = folder
        self.base = base
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator. ``name`` is lower-case letters, digits and underscores, at most 64.

        Raises UsageError for a malformed name, for one that another file holds, and for a class
        that is not of this kind, no dataclass of its own, or with a setting of a taken name.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{self.kind} name {name!r} must be lower-case letters, digits and underscores, "
                "at most 64"
            )

        def enter(cls: C) -> C:
            if self.base not in (f"{base.__module__}:{base.__name__}" for base in cls.__mro__):
                raise UsageError(
                    f"{self.kind} {name!r}: {cls.__name__} is not derived from "
                    f"{self.base.replace(':', '.')}"
                )
            # of a class that only inherits from a dataclass, the fields are no settings
            if "__dataclass_fields__" not in vars(cls):
                raise UsageError(
                    f"{self.kind} {name!r}: {cls.__name__} needs @dataclass(frozen=True), below "
                    "the line that registers it"
                )
            for field in dataclasses.fields(cls):
                if field.name in TAKEN:
                    raise UsageError(
                        f"{self.kind} {name!r}: a setting cannot be named {field.name!r}, which "
                        "tables have a meaning for"
                    )
            held = self._classes.get(name)
            if held is not None:
                home = held.__module__
            else:
                home = self._module(name) if name in self._modules() else cls.__module__
            if home != cls.__module__:
                raise self._doubled(name, home, cls.__module__)
            cls.name = name
            self._classes[name] = cls
            return cls

        return enter

    def names(self) -> tuple[str, ...]:
        """All names, sorted; imports none of the plug-ins."""
        installed = entry_points(group=f"purebench.{self.folder}").names
        return tuple(sorted({*self._classes, *self._modules(), *installed}))

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            points = entry_points(group=f"purebench.{self.folder}", name=name)
            homes = {point.value: point for point in points}
            module = self._module(name)
            if name in self._modules():
                if homes:
                    raise self._doubled(name, module, *homes)
                self._import(name)
            elif len(homes) > 1:
                raise self._doubled(name, *homes)
            elif homes:
                (point,) = homes.values()
                module = point.module
                self._load(point)
            else:
                raise UsageError(f"unknown {self.kind} {name!r}{near_match(name, self.names())}")
            if name not in self._classes:
                raise UsageError(
                    f"the {self.kind} plug-in {name!r} registers no class under that name"
                    f"{_registered(module)}"
                )
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def claims(self, module: str) -> bool:
        """Whether ``module`` registered something. UsageError where an installed package's entry
        point has the same name."""
        names = [name for name, cls in self._classes.items() if cls.__module__ == module]
        for name in names:
            for point in entry_points(group=f"purebench.{self.folder}", name=name):
                raise self._doubled(name, point.value, module)
        return bool(names)

    def _module(self, name: str) -> str:
        return f"purebench.{self.folder}.{name}"

    def _import(self, name: str) -> None:
        module = self._module(name)
        spec = importlib.util.find_spec(module)
        try:
            import_module(module)
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            own = [key for key, cls in self._classes.items() if cls.__module__ == module]
            for key in own:  # of a file that failed further down
                del self._classes[key]
            file = spec.origin if spec else None
            raise UsageError(
                f"{self.kind} {name!r} cannot be imported: {_blame(error, file or module)}"
            ) from error

    def _load(self, point: EntryPoint) -> None:
        try:
            point.load()
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            package = point.dist.name if point.dist else "an installed package"
            raise UsageError(
                f"{self.kind} {point.name!r} ({point.value}) of {package} cannot be imported: "
                f"{_reason(error)}"
            ) from error

    def _doubled(self, name: str, *modules: str) -> UsageError:
        files = [getattr(sys.modules.get(module), "__file__", module) for module in modules]
        return UsageError(f"two {self.folder} are named {name!r}: {' and '.join(files)}")

    def _modules(self) -> set[str]:
        spec = importlib.util.find_spec(f"purebench.{self.folder}")
        places = spec.submodule_search_locations if spec else None
        found = {module.name for module in pkgutil.iter_modules(places or [])}
        return {name for name in found if not name.startswith("_")}


ATTACKS: Registry[Attack] = Registry("attack", "attacks", "purebench.attack:Attack")
DEFENSES: Registry[Defense] = Registry("defense", "defenses", "purebench.defense:Defense")
MODELS: Registry[Architecture] = Registry("model", "models", "purebench.model:Architecture")
DATASETS: Registry[Dataset] = Registry("dataset", "datasets", "purebench.data:Dataset")

REGISTRIES: tuple[Registry[Any], ...] = (ATTACKS, DEFENSES, MODELS, DATASETS)


def load_plugin(path: str | Path) -> None:
    """Import a plug-in from a file of the user's, as ``--plugin`` does.

    Raises UsageError where the file is missing, cannot be imported, registers nothing, or
    registers a name that is taken.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--plugin {str(path)!r}: no such file")
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    module_name = f"purebench_plugin_{file.stem}_{place}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--plugin {str(path)!r}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        if isinstance(error, UsageError):
            raise
        where = _line(error, spec.origin)
        raise UsageError(f"--plugin {str(path)!r}{where}: {_reason(error)}") from error
    if not any(registry.claims(module_name) for registry in REGISTRIES):
        raise UsageError(f"--plugin {str(path)!r} registers nothing, see CONTRIBUTING.md")


def _registered(module: str) -> str:
    """What ``module`` registers instead, for the end of a refusal."""
    names = [
        f"{registry.kind} {name!r}"
        for registry in REGISTRIES
        for name, cls in registry._classes.items()
        if cls.__module__ == module
    ]
    return f", but {' and '.join(names)}" if names else ""


@contextmanager
def answering(kind: str, plugin: Any) -> Iterator[None]:
    """Whatever a plug-in raises before anything is trained is refused in one line: what it says of
    its own accord as it stands, a mistake in it with its place."""
    try:
        yield
    except (UsageError, OSError):
        raise
    except ValueError as error:
        raise UsageError(f"{kind} {plugin.name}: {error}") from error
    except (Exception, SystemExit) as error:
        file = inspect.getsourcefile(type(plugin)) or type(plugin).__module__
        raise UsageError(f"{kind} {plugin.name}: {_blame(error, file)}") from error


def _blame(error: BaseException, file: str) -> str:
    """What was raised, and where in a plug-in's file: 'mine.py, line 3: KeyError: 'x''."""
    return f"{file}{_line(error, file)}: {_reason(error)}"


def _line(error: BaseException, file: str | None) -> str:
    """Where in ``file`` it was raised: ', line 3'."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def _reason(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
