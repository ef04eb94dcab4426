"""Record: the result of one cell as one JSON file, failures included."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from .errors import UsageError
from .registry import TAKEN
from .scores import Scores, checked_stealth
from .settings import canonical
from .storage import write_atomic

SCHEMA = 1
PROTOCOL = "pb-1"
LARGEST = 2**63 - 1  # of a count, and of a seed

Status = Literal["ok", "failed", "diverged", "skipped"]
Provenance = Literal["", "self-reported", "verified", "flagged"]


@dataclass(frozen=True)
class Cell:
    """What was measured: every name and setting that the result depends on.

    dataset, model, attack, defense, recipe: {"name": ..., "settings": {...}, ...}.
    poison_rate: share of the training split, or of the target class under ``clean_label``.
    """

    dataset: dict[str, Any]
    model: dict[str, Any]
    attack: dict[str, Any]
    defense: dict[str, Any]
    recipe: dict[str, Any]
    seed: int
    poison_rate: float
    clean_label: bool
    target: int
    all_to_all: bool
    benign_fraction: float
    benign_source: str

    def __str__(self) -> str:
        return f"{self.attack['name']} / {self.defense['name']} / seed {self.seed}"


@dataclass(frozen=True)
class Record:
    """The result of one cell.

    fingerprint: of the cell; victim: of the backdoored model it used.
    status: "ok"; "skipped" where the defense does not apply; "diverged" where training or logits
        are not finite; "failed" where something raised.
    before, after: the undefended and the purified network's counts.
    benign_count: benign images the defender had.
    changed: part of the cell -> its settings that are not the defaults they had at the time, which
        tables tell: {"model": ["width"]}. Empty in records that are older than it.
    notes: the defense's own facts. victim_notes: the attack's.
    stealth: how far triggered test images lie from clean ones, see ``purebench.stealth``; empty
        where there is no trigger, and in records that are older than it.
    reactivated: the purified network's counts after a few steps on poisoned samples, where they
        were asked for.
    cost: wall seconds and peak bytes of purification, the defense's own timings; seconds of the
        attack's training.
    provenance: of a record that others sent: "self-reported"; "verified" where a cell of theirs
        was run again and came out the same; "flagged" where it did not.
    """

    cell: Cell
    fingerprint: str
    victim: str
    status: Status
    before: Scores | None = None
    after: Scores | None = None
    benign_count: int = 0
    error: str | None = None
    changed: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    victim_notes: dict[str, Any] = field(default_factory=dict)
    stealth: dict[str, float] = field(default_factory=dict)
    reactivated: Scores | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = ""
    schema: int = SCHEMA
    protocol: str = PROTOCOL

    @property
    def finished(self) -> bool:
        """Whether the cell need not be run again."""
        return self.status != "failed"

    @property
    def took(self) -> bool:
        """Whether there was a back door to remove: undefended ASR of at least 0.8, of a network
        that does not take everything for one class."""
        return self.before is not None and self.before.asr >= 0.8 and not self.before.degenerate

    def write(self, path: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        write_atomic(path, (text + "\n").encode())


class Unreadable(ValueError):
    """A file that is not a record of this schema; the text says what is wrong with it."""


def read_record(path: Path) -> Record:
    """Parse and check a record. Raises Unreadable, or OSError."""
    if path.exists() and not path.is_file():
        raise Unreadable(f"{path}: not a record: no regular file")
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise Unreadable(f"{path}: not a record: over {_MOST_BYTES} bytes")
    return parse_record(text, path)


def parse_record(text: bytes, path: Path | str) -> Record:
    """The record in a file's content. Raises Unreadable, which names ``path`` and the field."""
    try:
        content = json.loads(text.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
        if b"\\ud" in text.lower():  # half of a pair, which nobody could write again
            json.dumps(content, ensure_ascii=False).encode()
        if not isinstance(content, dict):
            raise ValueError(f"must be an object, got {_short(content)}")
        if "schema" not in content:
            raise ValueError("schema is missing")
        if type(content["schema"]) is not int or content["schema"] != SCHEMA:
            raise Unreadable(f"{path}: schema {_short(content['schema'])}, expected {SCHEMA}")
        _check_depth(content)
        return _record(content)
    except Unreadable:
        raise
    except UnicodeError as error:
        raise Unreadable(f"{path}: not a record: no UTF-8 text") from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise Unreadable(f"{path}: not a record: {error}") from error
    except RecursionError as error:
        raise Unreadable(f"{path}: not a record: nested too deeply") from error


def record_files(folder: Path) -> list[Path]:
    """The records below a folder, sorted. UsageError where a folder cannot be looked into."""

    def stop(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error

    found = [
        Path(place, name)
        for place, _, names in os.walk(folder, onerror=stop)
        if "records" in Path(place).parts
        for name in names
        if name.endswith(".json")
    ]
    return sorted(found)


def read_files(folder: Path) -> dict[Path, Record]:
    """The records below a folder, by their files. UsageError where one cannot be read."""
    try:
        return {path: read_record(path) for path in record_files(folder)}
    except Unreadable as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error


def read_records(folders: Sequence[Path]) -> list[Record]:
    """Every record below the folders, ``in_order``.

    Raises UsageError where a folder is not there, holds none, or a file is not a record.
    """
    found: list[Record] = []
    for folder in folders:
        if not os.path.isdir(folder):  # unlike Path.is_dir, False where it cannot be looked at
            raise UsageError(f"{folder}: no such folder")
        records = read_files(folder)
        if not records:
            raise UsageError(f"{folder}: no record there; records lie in folders named 'records'")
        found += records.values()
    once: dict[str, Record] = {}  # a cell counts once: ours before theirs, then the first folder's
    for record in sorted(found, key=lambda record: record.provenance != ""):
        cell = canonical([dataclasses.asdict(record.cell), record.protocol])
        once.setdefault(cell, record)  # whatever fingerprint it says that it has
    return in_order(once.values())


def in_order(records: Iterable[Record]) -> list[Record]:
    """By dataset, model, attack, defense and seed."""
    return sorted(records, key=lambda record: canonical(dataclasses.asdict(record.cell)))


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _record(content: dict[str, Any]) -> Record:
    _check_fields(content, Record, "", ("before", "after"))
    for name, allowed in (("status", get_args(Status)), ("provenance", get_args(Provenance))):
        if content.get(name, "") not in allowed:
            raise ValueError(f"unknown {name} {_short(content[name])}")
    for name in ("fingerprint", "victim", "protocol"):
        _check(name, content.get(name, ""), str)
    if content.get("error") is not None:
        _check("error", content["error"], str)
    for name in ("changed", "notes", "victim_notes", "stealth", "cost", "machine"):
        _check(name, content.get(name, {}), dict)
    _check_count("benign_count", content.get("benign_count", 0))
    _check_cost(content.get("cost", {}))
    if content.get("stealth", {}) != {}:
        checked_stealth(content["stealth"])
    cell = _cell(content["cell"])
    _check_changed(content.get("changed", {}), cell)
    scores = {
        name: None if content.get(name) is None else _scores(content[name], name)
        for name in ("before", "after", "reactivated")
    }
    record = Record(**{**content, **scores, "cell": cell})
    if record.status == "ok" and None in (record.before, record.after):
        raise ValueError("status 'ok' without scores")
    judged = [found for found in scores.values() if found is not None]
    if len({(found.clean_count, found.triggered_count) for found in judged}) > 1:
        raise ValueError("before, after and reactivated count different images")
    if record.status == "ok" and any(
        found.diverged for name, found in scores.items() if found and name != "reactivated"
    ):
        raise ValueError("status 'ok' with logits that are not finite")
    if record.status == "ok" and "seconds" not in record.cost:
        raise ValueError("cost.seconds is missing")
    return record


def _check_depth(content: Any) -> None:
    """That it is not nested so deeply that who walks it, or writes it again, runs out of stack."""
    level = [content]
    for _ in range(_MOST_DEEP):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


_KINDS = {str: "text", dict: "an object", bool: "true or false", list: "a list"}


def _check(name: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"{name} must be {_KINDS[kind]}, got {_short(value)}")


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{name} must be a whole number of 0 or more, got {_short(value)}")


def _check_fields(content: Any, cls: type, name: str, more: Sequence[str] = ()) -> None:
    """That ``content`` is an object with the fields of ``cls``; those without a default, and
    ``more``, have to be there."""
    _check(name, content, dict)
    prefix = f"{name}." if name else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            raise ValueError(f"{prefix}{key} is unknown")
    for key, item in fields.items():
        bare = item.default is item.default_factory is dataclasses.MISSING
        if (bare or key in more) and key not in content:
            raise ValueError(f"{prefix}{key} is missing")


def _check_cost(cost: dict[str, Any]) -> None:
    timings = cost.get("timings", {})
    _check("cost.timings", timings, dict)
    own = {name: value for name, value in cost.items() if name != "timings"}
    for name, value in (*own.items(), *((f"timings.{key}", timings[key]) for key in timings)):
        if type(value) not in (int, float) or not 0 <= value <= LARGEST:
            raise ValueError(f"cost.{name} must be a number of 0 or more, got {_short(value)}")


def _check_changed(changed: dict[str, Any], cell: Cell) -> None:
    for part, names in changed.items():
        if part not in _PARTS:
            raise ValueError(f"changed.{part} is unknown")
        _check(f"changed.{part}", names, list)
        if any(name not in getattr(cell, part)["settings"] for name in names):
            raise ValueError(f"changed names what is no setting of {part}: {_short(names)}")


_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MOST_BYTES, _MOST_DEEP = 4 * 2**20, 50
_PARTS = ("dataset", "model", "attack", "defense", "recipe")
_MORE = {"dataset": "digest", "attack": "revision", "defense": "revision"}


def _cell(content: Any) -> Cell:
    _check_fields(content, Cell, "cell")
    for name in ("seed", "target"):
        _check_count(f"cell.{name}", content[name])
    for name in ("clean_label", "all_to_all"):
        _check(f"cell.{name}", content[name], bool)
    _check("cell.benign_source", content["benign_source"], str)
    for name in ("poison_rate", "benign_fraction"):
        value = content[name]
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ValueError(f"cell.{name} must be a share, got {_short(value)}")
    for name in _PARTS:
        part = content[name]
        _check(f"cell.{name}", part, dict)
        for key in part.keys() - {"name", "settings", _MORE.get(name)}:
            raise ValueError(f"cell.{name}.{key} is unknown")
        if "revision" in part:
            _check_count(f"cell.{name}.revision", part["revision"])
        for key, kind in (("name", str), ("settings", dict)):
            if key not in part:
                raise ValueError(f"cell.{name}.{key} is missing")
            _check(f"cell.{name}.{key}", part[key], kind)
        if not _NAME.fullmatch(part["name"]):
            raise ValueError(
                f"cell.{name}.name must be lower-case letters, digits and underscores, at most 64, "
                f"got {_short(part['name'])}"
            )
        for key in part["settings"]:
            if not key.isidentifier() or key in TAKEN:
                raise ValueError(f"cell.{name}.settings: {_short(key)} is no name of a setting")
    return Cell(**content)


def _scores(content: Any, name: str) -> Scores:
    _check_fields(content, Scores, name)
    for key, value in content.items():
        _check_count(f"{name}.{key}", value)
    scores = Scores(**content)
    clean = max(scores.clean_correct, scores.most_predicted_count)
    if clean > scores.clean_count or scores.clean_count == 0:
        raise ValueError(f"{name}: clean counts do not fit: {content}")
    if scores.most_predicted_count == 0:
        raise ValueError(f"{name}: some class is predicted most often: {content}")
    if scores.nonfinite_count > scores.clean_count + scores.triggered_count:
        raise ValueError(f"{name}: more logits than images: {content}")
    triggered = scores.triggered_as_target + scores.triggered_as_true
    if triggered > scores.triggered_count or scores.triggered_count == 0:
        raise ValueError(f"{name}: triggered counts do not fit: {content}")
    return scores
