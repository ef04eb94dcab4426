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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import UsageError, near_match
from .picture import Picture

T = TypeVar("T")


class Located(dict[str, Any]):
    """Settings out of a file; ``places`` says where each stands: 'run.yaml, line 3: '."""

    def __init__(self, values: Mapping[str, Any], places: Mapping[str, str]) -> None:
        super().__init__(values)
        self.places = dict(places)


_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def build(cls: type[T], values: Mapping[str, Any], where: str, base: T | None = None) -> T:
    """An instance of the dataclass ``cls`` with ``values`` over its defaults, or over ``base``.

    Args:
        values: setting -> value; text is converted by the field's annotation.
        where: what the user calls ``cls``, for messages ("attack blend").

    Raises:
        UsageError: unknown setting, wrong type, or a value that ``cls`` itself refuses.
    """
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    places = values.places if isinstance(values, Located) else {}
    for key in values:
        if key not in fields:
            raise UsageError(
                f"{places.get(key, '')}{where} has no setting {key!r}{near_match(key, fields)}"
            )
    hints = get_type_hints(cls)
    converted = {
        key: convert(value, hints[key], f"{places.get(key, '')}{where}: {key}")
        for key, value in values.items()
    }
    try:
        return cls(**converted) if base is None else dataclasses.replace(base, **converted)  # type: ignore[type-var]
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        words = str(error).split() or [type(error).__name__]
        place = places.get(words[0], "")  # a refusal begins with the setting's name
        raise UsageError(f"{place}{where}: {' '.join(words)}") from error


def convert(value: Any, annotation: Any, where: str) -> Any:
    """``value``, which may be text, as ``annotation`` has it.

    Knows bool, int, float, str, Literal, tuple[X, ...], Mapping, Picture (given as the path of
    its file) and X | None.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType) and len(arguments) == 2 and type(None) in arguments:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return convert(value, inner, where)
    if origin is Literal:
        named = {str(argument): argument for argument in arguments}  # 2 is "2" on a command line
        found = named.get(value, value) if isinstance(value, str) else value
        if found not in arguments:
            raise UsageError(f"{where} must be one of {', '.join(named)}, got {value!r}")
        return found
    if origin is tuple and arguments[1:] == (...,):
        if isinstance(value, str) and arguments[0] is not str:
            value = value.replace(",", " ").split()
        if not isinstance(value, (list, tuple)):
            value = (value,)
        return tuple(convert(item, arguments[0], where) for item in value)
    if origin is Mapping or annotation is Any:
        return value
    if annotation is Picture:
        if not isinstance(value, str):
            raise UsageError(f"{where} must be the path of an image file, got {value!r}")
        try:
            return Picture.read(value)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
    converter = {bool: _bool, int: _int, float: _float, str: _str}.get(annotation)
    if converter is None:
        raise UsageError(
            f"{where}: a setting of type {annotation} cannot be given; use bool, int, float, str, "
            "Literal, tuple[X, ...], Picture or X | None"
        )
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
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def describe(instance: Any) -> dict[str, Any]:
    """The settings of a plug-in as JSON-able data, in the order of its fields.

    Left out: fields with ``metadata={"location": True}``, which say where data lies on one
    machine, not what it is; and, while it has its default, one with ``{"later": True}``: a setting
    that came when there were results already, which keep their fingerprints.
    """
    return {
        field.name: _plain(value)
        for field in dataclasses.fields(instance)
        for value in [getattr(instance, field.name)]
        if not field.metadata.get("location")
        and not (field.metadata.get("later") and value == field.default)
    }


def changed(instance: Any, base: Any = None) -> list[str]:
    """Those of the settings of ``describe`` that are not their defaults, or not as in ``base``."""
    return [
        field.name
        for field in dataclasses.fields(instance)
        if not field.metadata.get("location")
        and getattr(instance, field.name)
        != (_default(field) if base is None else getattr(base, field.name))
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _plain(value: Any) -> Any:
    if isinstance(value, Picture):
        return f"sha256:{value.digest}"
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def canonical(content: Any) -> str:
    """JSON with sorted keys and no spare blanks: equal content, equal text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(content: Any) -> str:
    """16 hexadecimal digits that name JSON-able ``content``."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses tags, keys that are not text, and keys given twice in one mapping;
    a date is text."""

    yaml_implicit_resolvers = {
        first: [(tag, shape) for tag, shape in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _refused(f"tag {tag!r} is not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise _refused(f"key {_source(key)} must be text", key.start_mark)
            if key.value in seen:
                raise _refused(f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return node


def _refused(reason: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=mark)


def _source(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else "[...]"


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML file's top-level mapping, and the line (from 1) of each key: "seeds", "set.blend".

    Raises UsageError with file and line for what is not plain, unambiguous YAML.
    """
    file = Path(path)
    try:
        loader = _StrictLoader(file.read_text("utf-8"))
        node = loader.get_single_node()
        content = loader.construct_document(node) if node else None
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 text") from error
    except UsageError:
        raise
    except ValueError as error:  # 0b_, a number of 5,000 digits
        raise UsageError(f"{file}: not valid YAML: {type(error).__name__}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{file}{line}: {error.problem or 'not valid YAML'}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"{file}: nested too deeply") from error
    if content is None:
        return {}, {}
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{file}, line 1: expected 'key: value' lines")
    return content, dict(_lines(node))


def _lines(node: yaml.Node, prefix: str = "", depth: int = 3) -> Iterator[tuple[str, int]]:
    # three deep is set.blend.alpha; an alias may lead back to its own beginning
    if isinstance(node, yaml.MappingNode) and depth:
        for key, value in node.value:
            yield f"{prefix}{key.value}", _line(key)
            yield from _lines(value, f"{prefix}{key.value}.", depth - 1)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
