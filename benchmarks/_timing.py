"""Timing: contestants measured in turn in one process, and what is said about them.

In turn, so that a machine that slows down slows all of them; every second round backwards, so
that none always runs after the same neighbour.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from purebench import machine

K = TypeVar("K")


class Spread(NamedTuple):
    """Median, least and greatest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 3) -> str:
        """ "1.23 (1.2 .. 1.31)", to so many significant digits."""
        median, low, high = (_significant(value, digits) for value in self)
        return f"{median} ({low} .. {high})"


@dataclass
class Times:
    """Of one contestant at one task, one entry a round.

    wall_seconds: by the clock.
    cpu_seconds: of this process, user and system; other processes hardly touch it.
    """

    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the work inside as a round."""
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.cpu_seconds.append(time.process_time() - cpu)
        self.wall_seconds.append(time.perf_counter() - wall)


def interleave(
    contestants: Mapping[K, Callable[[Times], object]],
    repeats: int,
    on_run: Callable[[K, float], object] = lambda name, seconds: None,
) -> dict[K, Times]:
    """Run every contestant once a round, ``repeats`` rounds.

    Args:
        contestants: each does its preparation, then its work inside ``with times.measured()``,
            exactly once.
        on_run: called after each run with its name and wall seconds, to show progress.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    found = {name: Times() for name in contestants}
    for round_index in range(repeats):
        names = list(contestants)
        for name in names if round_index % 2 == 0 else reversed(names):
            contestants[name](found[name])
            on_run(name, found[name].wall_seconds[-1])
    return found


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times faster, from the quotients of each round's pair."""
    return Spread.of([a / b for a, b in zip(slow, fast, strict=True)])


def conditions() -> dict[str, Any]:
    """What a time depends on besides the code: machine, versions, commit, threads."""
    return {
        "machine": machine.device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }


def _significant(value: float, digits: int) -> str:
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:g}" if rounded < 10**digits else f"{rounded:.0f}"
