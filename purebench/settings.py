"""Settings: a frozen dataclass from text or YAML, strictly; and the fingerprint of one.

A plug-in's fields are its settings: their annotations convert text, their defaults are the
defaults. What is unknown, doubled or of a wrong type is refused in one line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
from collections.abc import Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import UsageError, near_match

T = TypeVar("T")

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass ``cls`` with ``values`` over its defaults.

    Args:
        values: setting -> value; text is converted by the field's annotation.
        where: what the user calls ``cls``, for messages ("attack blend").

    Raises:
        UsageError: unknown setting, wrong type, or a value that ``cls`` itself refuses.
    """
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UsageError(f"{where} has no setting {key!r}{near_match(str(key), fields)}")
    hints = get_type_hints(cls)
    converted = {
        key: convert(value, hints[key], f"{where}: {key}") for key, value in values.items()
    }
    try:
        return cls(**converted)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error


def convert(value: Any, annotation: Any, where: str) -> Any:
    """``value``, which may be text, as ``annotation`` has it.

    Knows bool, int, float, str, Literal, tuple[X, ...], Mapping and X | None.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return convert(value, inner, where)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise UsageError(f"{where} must be one of {choices}, got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str) and arguments[0] is not str:
            value = value.replace(",", " ").split()
        if not isinstance(value, (list, tuple)):
            value = (value,)
        return tuple(convert(item, arguments[0], where) for item in value)
    if origin is not None or annotation is Any:
        return value
    converter = {bool: _bool, int: _int, float: _float, str: _str}[annotation]
    result = converter(value)
    if result is None:
        raise UsageError(f"{where} must be {_ARTICLE[annotation]}, got {value!r}")
    return result


_ARTICLE = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else _WORDS.get(str(value).lower())


def _int(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)  # YAML reads 1e-3 as a string
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def describe(instance: Any) -> dict[str, Any]:
    """The settings of a plug-in as JSON-able data, in the order of its fields."""
    return {
        field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)
    }


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def canonical(content: Any) -> str:
    """JSON with sorted keys and no spare blanks: equal content, equal text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(content: Any) -> str:
    """16 hexadecimal digits that name JSON-able ``content``."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, with its line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value!r}", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML file's top-level mapping, and the line (from 1) of each of its keys.

    Raises UsageError with file and line for what is not plain, unambiguous YAML.
    """
    file = Path(path)
    try:
        text = file.read_text("utf-8")
        node = yaml.compose(text, _StrictLoader)
        content = yaml.load(text, _StrictLoader)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{file}{line}: {error.problem or 'not valid YAML'}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from error
    if content is None:
        return {}, {}
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{file}, line 1: expected 'key: value' lines")
    for key in content:
        if not isinstance(key, str):
            raise UsageError(f"{file}: key {key!r} must be text")
    return content, {key.value: key.start_mark.line + 1 for key, _ in node.value}


def at_line(file: str | Path, line: int) -> partial[str]:
    """A formatter that puts file and line before a message."""
    return partial("{}, line {}: {}".format, file, line)
