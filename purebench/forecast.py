"""Forecast: how long a sweep will take, and how much it will write, if all goes as it went before.

What went before are the records and networks that lie in the output folder.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from .artifact import CARD
from .record import Unreadable, read_record

Step = tuple[str, str, str]  # "attack" or "defense", its name, the model's


@dataclass(frozen=True)
class Work:
    """What is left of one victim: whether it is to be trained, and the cells' defenses."""

    attack: str
    model: str
    trains: bool
    defenses: tuple[str, ...]

    @property
    def training(self) -> Step:
        return ("attack", self.attack, self.model)

    @property
    def steps(self) -> list[Step]:
        first = [self.training] if self.trains else []
        return first + [("defense", name, self.model) for name in self.defenses]


@dataclass(frozen=True)
class Past:
    """Means over what has been measured.

    seconds: of steps. network_bytes: of an attack's network, with all that is kept with it.
    record_bytes: of a record.
    """

    seconds: dict[Step, float] = field(default_factory=dict)
    network_bytes: dict[tuple[str, str], float] = field(default_factory=dict)
    record_bytes: float = 0.0

    @classmethod
    def of(cls, output: Path) -> Past:
        """Of all that can be read in an output folder."""
        seconds: dict[Step, list[float]] = defaultdict(list)
        networks: dict[tuple[str, str], list[float]] = defaultdict(list)
        records = [0.0]
        for path in (output / "records").rglob("*.json"):
            try:
                record = read_record(path)
            except (OSError, Unreadable):
                continue
            records.append(path.stat().st_size)
            if record.status == "ok":
                cell, cost = record.cell, record.cost
                model = cell.model["name"]
                seconds["defense", cell.defense["name"], model].append(cost["seconds"])
                training = cost.get("training_seconds", 0.0)
                seconds["attack", cell.attack["name"], model].append(training)
        for card in (output / "models").glob(f"*/{CARD}"):
            try:
                identity = json.loads(card.read_text("utf-8"))["identity"]
                names = (identity["attack"]["name"], identity["model"]["name"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            networks[names].append(sum(file.stat().st_size for file in card.parent.iterdir()))
        return cls(
            {step: fmean(values) for step, values in seconds.items()},
            {names: fmean(values) for names, values in networks.items()},
            fmean(records[1:] or records),
        )

    def network_size(self, attack: str, model: str) -> float | None:
        """Bytes; of an attack without a network, as the model's others."""
        others = [size for (_, name), size in self.network_bytes.items() if name == model]
        return self.network_bytes.get((attack, model), fmean(others) if others else None)


@dataclass(frozen=True)
class Forecast:
    """trainings: how many. work_seconds: of all steps. wall_seconds: of ``workers`` at once.
    written_bytes: of networks and records. unknown: what is counted as nothing, as text."""

    trainings: int
    workers: int
    work_seconds: float
    wall_seconds: float
    written_bytes: float
    unknown: tuple[str, ...]

    @classmethod
    def of(cls, works: Sequence[Work], past: Past, workers: int, split: bool) -> Forecast:
        """Workers take what comes next. One victim is one worker's, or, if ``split``, its
        defenses are any worker's once it is trained."""
        steps = {step for work in works for step in work.steps}
        unknown = {f"{name} ({model})" for _, name, model in steps - set(past.seconds)}
        unsized, chains, written = set(), [], 0.0
        for work in works:
            seconds = [past.seconds.get(step, 0.0) for step in work.steps]
            first = 1 + work.trains  # the attack task does the first cell, too
            count = first if split else len(seconds)
            chains.append((sum(seconds[:count]), seconds[count:]))
            written += past.record_bytes * len(work.defenses)
            if work.trains:
                size = past.network_size(work.attack, work.model)
                written += size or 0.0
                if size is None:
                    unsized.add(f"size of {work.model}'s networks")
        return cls(
            trainings=sum(work.trains for work in works),
            workers=workers,
            work_seconds=sum(seconds + sum(rest) for seconds, rest in chains),
            wall_seconds=wall_seconds(chains, workers),
            written_bytes=written,
            unknown=(*sorted(unknown), *sorted(unsized)),
        )

    def __str__(self) -> str:
        text = (
            f"{self.trainings} trainings; about {duration(self.work_seconds)} of training and "
            "defending"
        )
        if self.workers > 1:
            text += f", {duration(self.wall_seconds)} with {self.workers} at once"
        text += f"; about {_size(self.written_bytes)} to write"
        if self.unknown:
            text += f"\nnot counted, for want of records: {', '.join(self.unknown)}"
        return text


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
