"""Pool: worker processes on this machine, one task each at a time.

A worker that dies is started again, which goes on from the finished records; a cell that kills it
twice, or takes longer than it may, is recorded as failed, and left out. A Ctrl-C that is kept is
passed on to the workers.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from .. import interrupt, worker
from ..errors import DiskFull, UsageError
from ..progress import Progress
from ..sweep import Order, Sweep, Task, Tell, fulfil

TRIES = 2  # deaths of a worker in one cell before it is given up
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Pool:
    """jobs: processes at once, at least 1; else one a core, or as many as GPUs have slots.
    gpu_slots: processes that share a GPU, at least 1; else however many ``jobs`` makes it.
    timeout: seconds that a cell may take, the training of its victim included."""

    jobs: int | None = None
    gpu_slots: int | None = None
    timeout: float | None = None

    def run(self, sweep: Sweep, tell: Tell, progress: Progress) -> None:
        _Crew(sweep, self._places(sweep), tell, progress, self.timeout).run()

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
        worker.lead()
        with interrupt.deferred():
            fulfil(order, lambda what, path: pipe.send((what, path)))
    except KeyboardInterrupt:
        sys.exit(130)
    except DiskFull as error:
        pipe.send(("full", str(error)))


class _Crew:
    """Up to a worker on each of ``places``, one task each."""

    def __init__(
        self,
        sweep: Sweep,
        places: list[str],
        tell: Tell,
        progress: Progress,
        timeout: float | None,
    ) -> None:
        self.sweep, self.places, self.tell, self.progress = sweep, places, tell, progress
        self.timeout = timeout
        self.deaths: dict[tuple[Task, Path | None], int] = defaultdict(int)
        self.running: dict[Connection, tuple[SpawnProcess, Task, str]] = {}
        self.at: dict[Connection, Path | None] = {}
        self.since: dict[Connection, float] = {}  # that it has been there

    def run(self) -> None:
        left = set(self.sweep.left())
        waiting = [task for task in reversed(self.sweep.tasks) if left & set(task.records)]
        interrupted = False
        try:
            while self.running or (waiting and not interrupt.asked()):
                while waiting and self.places and not interrupt.asked():
                    self._start(waiting.pop(), self.places.pop(0))
                for pipe in wait(list(self.running), _POLL_SECONDS):
                    assert isinstance(pipe, Connection)
                    try:
                        what, path = pipe.recv()
                    except (EOFError, ConnectionError):
                        waiting += self._ended(pipe)
                        continue
                    if what == "full":
                        raise DiskFull(path)
                    self.at[pipe] = path if what == "begin" else None
                    self.since[pipe] = time.monotonic()
                    self.tell(what, path)
                for pipe, (process, *_) in self.running.items():
                    if self._late(pipe):
                        worker.end(process)
                if interrupt.asked() and not interrupted:
                    interrupted = True
                    for process, *_ in self.running.values():
                        worker.interrupt(process)
            interrupt.check()
        finally:
            for process, *_ in self.running.values():
                worker.end(process)

    def _late(self, pipe: Connection) -> bool:
        return (
            self.timeout is not None
            and self.at[pipe] is not None
            and time.monotonic() - self.since[pipe] > self.timeout
        )

    def _start(self, task: Task, place: str) -> None:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        order = self.sweep.order(task)
        configs = (replace(config, threads=1, device=place) for config in order.configs)
        process = worker.start(_worker, theirs, replace(order, configs=(*configs,)))
        theirs.close()
        self.running[ours], self.at[ours] = (process, task, place), None

    def _ended(self, pipe: Connection) -> list[Task]:
        """What is left of the task, where its worker died."""
        process, task, place = self.running.pop(pipe)
        process.join()
        worker.end(process)
        self.places.append(place)
        late, path = self._late(pipe), self.at.pop(pipe)
        if process.exitcode == 0 or interrupt.asked():
            return []
        self.deaths[task, path] += TRIES if late else 1
        reason, times = f"the worker died with exit code {process.exitcode}", f", {TRIES} times"
        if late:
            reason, times = f"it took longer than {self.timeout:g} s", ""
        where = path.stem if path else f"{task.attack}, seed {task.seed}, before its first cell"
        self.progress.say(f"{where}: {reason}")
        if self.deaths[task, path] < TRIES:
            return [task]
        given_up = task.records if path is None else (path,)
        self.sweep.give_up(given_up, reason + times, self.tell)
        rest = tuple(record for record in task.records if record not in given_up)
        return [replace(task, records=rest)] if rest else []
