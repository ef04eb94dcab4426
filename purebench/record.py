"""Record: the result of one cell as one JSON file, failures included."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import UsageError
from .scores import Scores, checked_stealth
from .settings import canonical
from .storage import write_atomic

SCHEMA = 1
PROTOCOL = "pb-1"

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
    return parse_record(path.read_bytes(), path)


def parse_record(text: bytes, path: Path | str) -> Record:
    """The record in a file's content. Raises Unreadable, which names ``path``."""
    try:
        content = json.loads(text.decode("utf-8"), parse_constant=_no_number)
        if content["schema"] != SCHEMA:
            raise Unreadable(f"{path}: schema {content['schema']!r}, expected {SCHEMA}")
        if content["status"] not in get_args(Status):
            raise Unreadable(f"{path}: unknown status {content['status']!r}")
        if content.get("provenance", "") not in get_args(Provenance):
            raise Unreadable(f"{path}: unknown provenance {content['provenance']!r}")
        content["cell"] = _cell(content["cell"])
        for key in ("before", "after"):
            if content[key] is not None:
                content[key] = _scores(content[key])
        if content.get("reactivated") is not None:
            content["reactivated"] = _scores(content["reactivated"])
        if content.get("stealth", {}) != {}:
            checked_stealth(content["stealth"])
        record = Record(**content)
        for part, names in record.changed.items():
            if not set(names) <= set(getattr(record.cell, part)["settings"]):
                raise ValueError(f"changed names what is no setting of {part}: {names}")
        scored = None not in (record.before, record.after, record.cost.get("seconds"))
        if record.status == "ok" and not scored:
            raise ValueError("status 'ok' without scores or seconds")
        return record
    except Unreadable:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{path}: not a record: {type(error).__name__}: {error}") from error


def read_records(folders: Sequence[Path]) -> list[Record]:
    """Every record below the folders, in the order of dataset, model, attack, defense and seed.

    Raises UsageError where a folder is not there, holds none, or a file is not a record.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        paths = sorted(folder.rglob("*.json"))
        records = [path for path in paths if "records" in path.parts]
        if not records:
            raise UsageError(f"{folder}: no record there; records lie in folders named 'records'")
        try:
            found += [read_record(path) for path in records]
        except Unreadable as error:
            raise UsageError(str(error)) from error
    return sorted(found, key=lambda record: canonical(dataclasses.asdict(record.cell)))


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _cell(content: dict[str, Any]) -> Cell:
    cell = Cell(**content)
    for kind, names in (
        (int, ("seed", "target")),
        (bool, ("clean_label", "all_to_all")),
        (str, ("benign_source",)),
    ):
        for name in names:
            if type(getattr(cell, name)) is not kind:
                raise ValueError(f"cell.{name} must be {kind.__name__}, got {content[name]!r}")
    for name in ("poison_rate", "benign_fraction"):
        value = content[name]
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ValueError(f"cell.{name} must be a share, got {value!r}")
    for name in ("dataset", "model", "attack", "defense", "recipe"):
        part = content[name]
        if not isinstance(part["name"], str) or not isinstance(part["settings"], dict):
            raise ValueError(f"cell.{name} must have a name and settings, got {part!r}")
    return cell


def _scores(content: dict[str, Any]) -> Scores:
    if any(type(value) is not int or value < 0 for value in content.values()):
        raise ValueError(f"counts must be whole numbers, got {content}")
    scores = Scores(**content)
    clean = max(scores.clean_correct, scores.most_predicted_count)
    if clean > scores.clean_count or scores.clean_count == 0:
        raise ValueError(f"clean counts do not fit: {content}")
    triggered = scores.triggered_as_target + scores.triggered_as_true
    if triggered > scores.triggered_count or scores.triggered_count == 0:
        raise ValueError(f"triggered counts do not fit: {content}")
    return scores
