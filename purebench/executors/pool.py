"""Pool: worker processes on this machine, one task each at a time.

A worker that dies is started again, which goes on from the finished records; a cell that kills it
twice is recorded as failed, and left out.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..progress import Progress
from ..sweep import Order, Sweep, Task, Tell, fulfil

TRIES = 2  # deaths of a worker in one cell before it is given up


@dataclass(frozen=True)
class Pool:
    """jobs: processes at once, at least 1; else one a core, or as many as GPUs have slots.
    gpu_slots: processes that share a GPU, at least 1; else however many ``jobs`` makes it."""

    jobs: int | None = None
    gpu_slots: int | None = None

    def run(self, sweep: Sweep, tell: Tell, progress: Progress) -> None:
        _Crew(sweep, self._places(sweep), tell, progress).run()

    def _places(self, sweep: Sweep) -> list[str]:
        """The device of each process."""
        device = sweep.plans[0].device
        if device.type != "cuda":
            if self.gpu_slots is not None:
                raise UsageError(f"--gpu-slots is for GPUs, and this runs on {device}")
            return [sweep.plans[0].config.device] * (self.jobs or os.cpu_count() or 1)
        gpus = [str(device)]
        if device.index is None:
            gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        slots = self.gpu_slots or -(-(self.jobs or 1) // len(gpus))
        return (gpus * slots)[: self.jobs]


def _worker(pipe: Connection, order: Order) -> None:
    """A process of its own."""
    try:
        fulfil(order, lambda what, path: pipe.send((what, path)))
    except KeyboardInterrupt:
        sys.exit(130)


class _Crew:
    """Up to a worker on each of ``places``, one task each."""

    def __init__(self, sweep: Sweep, places: list[str], tell: Tell, progress: Progress) -> None:
        self.sweep, self.places, self.tell, self.progress = sweep, places, tell, progress
        self.deaths: dict[tuple[Task, Path | None], int] = defaultdict(int)
        self.running: dict[Connection, tuple[Any, Task, str]] = {}
        self.at: dict[Connection, Path | None] = {}

    def run(self) -> None:
        left = set(self.sweep.left())
        waiting = [task for task in reversed(self.sweep.tasks) if left & set(task.records)]
        try:
            while waiting or self.running:
                while waiting and self.places:
                    self._start(waiting.pop(), self.places.pop(0))
                for pipe in wait(list(self.running)):
                    assert isinstance(pipe, Connection)
                    try:
                        what, path = pipe.recv()
                    except EOFError:
                        waiting += self._ended(pipe)
                    else:
                        self.at[pipe] = path if what == "begin" else None
                        self.tell(what, path)
        finally:
            for process, *_ in self.running.values():
                process.terminate()
                process.join()

    def _start(self, task: Task, place: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe(duplex=False)
        order = self.sweep.order(task)
        configs = (replace(config, threads=1, device=place) for config in order.configs)
        process = spawn.Process(target=_worker, args=(theirs, replace(order, configs=(*configs,))))
        process.start()
        theirs.close()
        self.running[ours], self.at[ours] = (process, task, place), None

    def _ended(self, pipe: Connection) -> list[Task]:
        """What is left of the task, where its worker died."""
        process, task, place = self.running.pop(pipe)
        process.join()
        self.places.append(place)
        path = self.at.pop(pipe)
        if process.exitcode == 0:
            return []
        self.deaths[task, path] += 1
        reason = f"the worker died with exit code {process.exitcode}"
        where = path.stem if path else f"{task.attack}, seed {task.seed}, before its first cell"
        self.progress.say(f"{where}: {reason}")
        if self.deaths[task, path] < TRIES:
            return [task]
        given_up = task.records if path is None else (path,)
        self.sweep.give_up(given_up, f"{reason}, {TRIES} times", self.tell)
        rest = tuple(record for record in task.records if record not in given_up)
        return [replace(task, records=rest)] if rest else []
