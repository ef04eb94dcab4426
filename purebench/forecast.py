"""Forecast: how long a sweep will take, and how much it will write, if all goes as it went before.

What went before are the records and networks that lie in the output folder.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from .artifact import CARD
from .record import Unreadable, read_record
from .settings import canonical

_KINDS: tuple[Literal["attack"], Literal["defense"]] = ("attack", "defense")


@dataclass(frozen=True)
class Step:
    """A training by an attack, or a defense of one network, as far as it decides on the time.

    name: of the plug-in. where: dataset, model, recipe and its epochs, as text. sizes: the
    settings of dataset and model, and settings: the plug-in's own, of a defense with the benign
    share; both as JSON.
    """

    kind: Literal["attack", "defense"]
    name: str
    where: str
    sizes: str = ""
    settings: str = ""

    @classmethod
    def of(cls, kind: Literal["attack", "defense"], cell: Mapping[str, Any]) -> Step:
        """From the parts of a cell, or of a victim's identity."""
        recipe, plugin = cell["recipe"], cell[kind]
        names = (cell["dataset"]["name"], cell["model"]["name"], recipe["name"])
        return cls(
            kind,
            plugin["name"],
            f"{', '.join(names)}, {recipe['settings']['epochs']} epochs",
            canonical([cell["dataset"]["settings"], cell["model"]["settings"]]),
            canonical([plugin["settings"], cell["benign_fraction"] if kind == "defense" else None]),
        )


@dataclass(frozen=True)
class Work:
    """What is left of one victim: its training, and whether that is to be done; the defenses of
    its cells."""

    training: Step
    trains: bool
    defenses: tuple[Step, ...]

    @property
    def steps(self) -> list[Step]:
        return [*([self.training] if self.trains else []), *self.defenses]


@dataclass(frozen=True)
class Past:
    """Means over what has been measured.

    seconds: of steps. network_bytes: of the network that a training leaves, with all that is kept
    with it. record_bytes: of a record; None where there is none.
    """

    seconds: dict[Step, float] = field(default_factory=dict)
    network_bytes: dict[Step, float] = field(default_factory=dict)
    record_bytes: float | None = None

    @classmethod
    def of(cls, output: Path) -> Past:
        """Of all that can be read in an output folder."""
        seconds: dict[Step, list[float]] = defaultdict(list)
        networks: dict[Step, list[float]] = defaultdict(list)
        records = []
        for path in (output / "records").rglob("*.json"):
            try:
                record = read_record(path)
                training, defense = (Step.of(k, vars(record.cell)) for k in _KINDS)
            except (OSError, Unreadable, KeyError, TypeError):
                continue
            records.append(path.stat().st_size)
            if record.status == "ok":
                seconds[defense].append(record.cost["seconds"])
                seconds[training].append(record.cost.get("training_seconds", 0.0))
        for card in (output / "models").glob(f"*/{CARD}"):
            try:
                training = Step.of("attack", json.loads(card.read_text("utf-8"))["identity"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            networks[training].append(sum(file.stat().st_size for file in card.parent.iterdir()))
        return cls(
            {step: fmean(values) for step, values in seconds.items()},
            {step: fmean(values) for step, values in networks.items()},
            fmean(records) if records else None,
        )

    def network_size(self, training: Step) -> float | None:
        """Bytes; of an attack without a network, as the others' on the same data and model."""
        alike = (training.where, training.sizes)
        others = [n for step, n in self.network_bytes.items() if (step.where, step.sizes) == alike]
        return self.network_bytes.get(training, fmean(others) if others else None)


@dataclass(frozen=True)
class Forecast:
    """trainings: how many. work_seconds: of all steps. wall_seconds: of ``workers`` at once.
    written_bytes: of networks and records. unknown: what of it is counted as nothing, for want of
    records: steps, and files of which no size is known. known: how many of both are counted."""

    trainings: int
    workers: int
    work_seconds: float
    wall_seconds: float
    written_bytes: float
    unknown: tuple[Step, ...] = ()
    known: int = 0
    unsized: int = 0
    sized: int = 0

    @classmethod
    def of(cls, works: Sequence[Work], past: Past, workers: int, split: bool) -> Forecast:
        """Workers take what comes next. One victim is one worker's, or, if ``split``, its
        defenses are any worker's once it is trained."""
        steps = [step for work in works for step in work.steps]
        unknown = tuple(step for step in steps if step not in past.seconds)
        chains, sizes = [], []
        for work in works:
            seconds = [past.seconds.get(step, 0.0) for step in work.steps]
            first = 1 + work.trains  # the attack task does the first cell, too
            count = first if split else len(seconds)
            chains.append((sum(seconds[:count]), seconds[count:]))
            sizes += [past.record_bytes] * len(work.defenses)
            sizes += [past.network_size(work.training)] if work.trains else []
        sized = [size for size in sizes if size is not None]
        return cls(
            trainings=sum(work.trains for work in works),
            workers=workers,
            work_seconds=sum(seconds + sum(rest) for seconds, rest in chains),
            wall_seconds=wall_seconds(chains, workers),
            written_bytes=sum(sized),
            unknown=unknown,
            known=len(steps) - len(unknown),
            unsized=len(sizes) - len(sized),
            sized=len(sized),
        )

    def __str__(self) -> str:
        time = duration(self.work_seconds)
        if self.workers > 1:
            time += f", {duration(self.wall_seconds)} with {self.workers} at once"
        time = _told(time, len(self.unknown), self.known)
        size = _told(_size(self.written_bytes), self.unsized, self.sized)
        text = f"{self.trainings} trainings; training and defending: {time}; to write: {size}"
        told = [self._lacking()] if self.known and self.unknown else []
        told += [f"the size of {self.unsized} files"] if self.sized and self.unsized else []
        return text + (f"\nnot counted, for want of records: {'; '.join(told)}" if told else "")

    def _lacking(self) -> str:
        """How much is not counted, and of what."""
        count = sum(step.kind == "attack" for step in self.unknown)
        of: dict[str, set[str]] = defaultdict(set)
        for step in self.unknown:
            of[step.where].add(step.name)
        names = [f"{', '.join(sorted(of[where]))} ({where})" for where in sorted(of)]
        return (
            f"{count} of {self.trainings} trainings, the defenses of {len(self.unknown) - count} "
            f"cells: {'; '.join(names)}"
        )


def _told(amount: str, unknown: int, known: int) -> str:
    if unknown:
        return f"at least {amount}" if known else "unknown, for want of records"
    return f"about {amount}"


def wall_seconds(chains: Iterable[tuple[float, Sequence[float]]], workers: int) -> float:
    """Until the last of ``chains`` is done: seconds of a first task, and of those that can begin
    when it has ended. A worker that is free takes the task that has waited longest."""
    waiting = [(0.0, number, first, rest) for number, (first, rest) in enumerate(chains)]
    number = len(waiting)
    free = [0.0] * workers
    while waiting:
        ready, _, seconds, rest = heapq.heappop(waiting)
        end = max(ready, heapq.heappop(free)) + seconds
        heapq.heappush(free, end)
        for each in rest:
            heapq.heappush(waiting, (end, number, each, ()))
            number += 1
    return max(free)


def duration(seconds: float) -> str:
    """In words, rounded."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
