"""Sweep: many runs as one, planned before anything is trained, and worked off by several processes.

One task is one victim with all its defenses and benign fractions, so that its training serves them
all. A worker that dies is started again, which goes on from the finished records; a cell that kills
it twice is recorded as failed, and left out.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import fmean
from typing import Any

from .config import RunConfig
from .progress import Progress
from .record import Cell, Record, Unreadable, read_record
from .runner import Plan, Victim, crashed, execute, is_done, prepare, record_path

TRIES = 2  # deaths of a worker in one cell before it is given up

Tell = Callable[[str, Path], None]  # ("begin" | "done" | "found", the cell's record)


@dataclass(frozen=True)
class Task:
    """One victim: the attack, the seed, and which of the sweep's runs it has cells in."""

    attack: str
    seed: int
    runs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Sweep:
    """plans: one a run, checked. tasks: their victims, each once."""

    plans: tuple[Plan, ...]
    tasks: tuple[Task, ...]

    @classmethod
    def of(cls, configs: Sequence[RunConfig], progress: Progress) -> Sweep:
        """Check every run. UsageError for what cannot be run, before anything is trained."""
        plans = tuple(prepare(config, progress) for config in configs)
        found: dict[tuple[Any, ...], dict[float, int]] = defaultdict(dict)
        for run, plan in enumerate(plans):
            for seed in plan.config.seeds:
                for attack in plan.attacks:  # the control has one rate, whatever the run's
                    key = (plan.architecture.name, plan.rate(attack), seed, attack.name)
                    found[key].setdefault(plan.config.benign_fraction, run)
        tasks = (Task(key[3], key[2], (*runs.values(),)) for key, runs in found.items())
        seeds = configs[0].seeds  # one everywhere before the next: half a sweep is then a board
        return cls(plans, tuple(sorted(tasks, key=lambda task: seeds.index(task.seed))))

    def cells(self) -> Iterable[tuple[Plan, Cell, Path]]:
        """Every cell once, with its plan and its record's file."""
        for task in self.tasks:
            for run in task.runs:
                plan = self.plans[run].only(task.attack, task.seed)
                for defense in plan.defenses:
                    cell = plan.cell(plan.attacks[0], defense, task.seed)
                    yield plan, cell, record_path(plan, cell)

    def left(self) -> list[tuple[Plan, Cell]]:
        """Cells without a record that answers them."""
        return [
            (plan, cell) for plan, cell, path in self.cells() if not _answered(plan, cell, path)
        ]

    def describe(self, jobs: int) -> str:
        """What there is to do, and how long it took before."""
        left = self.left()
        total = sum(1 for _ in self.cells())
        lines = [
            f"{len(self.tasks)} victims, {total} cells: {total - len(left)} done, {len(left)} left"
        ]
        victims = {}
        for plan, cell in left:
            victim = Victim(plan, plan.attacks[0], cell.seed)
            if plan.config.force or not victim.folder.is_dir():
                victims[victim.fingerprint] = ("attack", cell.attack["name"], cell.model["name"])
        steps = [*victims.values()]
        steps += [("defense", cell.defense["name"], cell.model["name"]) for _, cell in left]
        past = self._past()
        seconds = sum(past.get(step, 0.0) for step in steps) / jobs
        unknown = {step[1:] for step in steps if step not in past}
        lines.append(
            f"{len(victims)} trainings; about {_duration(seconds)} of training and defending"
        )
        if unknown:
            names = ", ".join(f"{name} ({model})" for name, model in sorted(unknown))
            lines.append(f"not counted, for want of records: {names}")
        return "\n".join(lines)

    def _past(self) -> dict[tuple[str, str, str], float]:
        """(kind, plug-in, model) -> mean seconds in the records that are there."""
        seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for folder in {plan.output / "records" for plan in self.plans}:
            for path in folder.rglob("*.json"):
                record = _read(path)
                if record is not None and record.status == "ok":
                    cell, cost = record.cell, record.cost
                    model = cell.model["name"]
                    seconds["defense", cell.defense["name"], model].append(cost["seconds"])
                    training = cost.get("training_seconds", 0.0)
                    seconds["attack", cell.attack["name"], model].append(training)
        return {step: fmean(values) for step, values in seconds.items()}

    def run(self, jobs: int, progress: Progress) -> list[Record]:
        """Work off all cells and give their records, in the order of the tasks."""
        left = {str(record_path(plan, cell)) for plan, cell in self.left()}
        count = 0
        with progress.without_lines().bar("sweep", len(left), "cell") as bar:

            def tell(what: str, path: Path) -> None:
                nonlocal count
                if what == "begin" or str(path) not in left:
                    return
                count += 1
                bar.step()
                record = read_record(path)
                after = record.after
                verdict = f"ACC {after.acc:.2%}, ASR {after.asr:.2%}" if after else record.error
                progress.say(f"[{count}/{len(left)}] {record.cell}: {record.status}, {verdict}")

            if jobs == 1:
                for task in self.tasks:
                    work([self.plans[run] for run in task.runs], task, tell, frozenset())
            else:
                _Crew(self, jobs, tell, progress).run()
        return [record for _, _, path in self.cells() if (record := _read(path))]


def work(plans: Iterable[Plan], task: Task, tell: Tell, skipped: frozenset[str]) -> None:
    """The task's cells, but for those whose record's file is ``skipped``."""

    def begin(_: Cell, path: Path) -> bool:
        tell("begin", path)
        return str(path) not in skipped

    for plan in plans:
        for _ in execute(
            plan.only(task.attack, task.seed), lambda _, path, found: tell("done", path), begin
        ):
            pass


def _worker(
    pipe: Connection, configs: Sequence[RunConfig], task: Task, skipped: frozenset[str]
) -> None:
    """A process of its own."""
    try:
        plans = (prepare(config, Progress(config.quiet).without_bars()) for config in configs)
        work(plans, task, lambda what, path: pipe.send((what, path)), skipped)
    except KeyboardInterrupt:
        sys.exit(130)


class _Crew:
    """Up to ``jobs`` workers, one task each."""

    def __init__(self, sweep: Sweep, jobs: int, tell: Tell, progress: Progress) -> None:
        self.sweep, self.jobs, self.tell, self.progress = sweep, jobs, tell, progress
        self.deaths: dict[tuple[Task, Path | None], int] = defaultdict(int)
        self.skipped: dict[Task, frozenset[str]] = defaultdict(frozenset)
        self.running: dict[Connection, tuple[Any, Task]] = {}
        self.at: dict[Task, Path | None] = {}

    def run(self) -> None:
        waiting = list(reversed(self.sweep.tasks))
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs:
                    self._start(waiting.pop())
                for pipe in wait(list(self.running)):
                    assert isinstance(pipe, Connection)
                    try:
                        what, path = pipe.recv()
                    except EOFError:
                        waiting += self._ended(pipe)
                    else:
                        _, task = self.running[pipe]
                        self.at[task] = path if what == "begin" else None
                        self.tell(what, path)
        finally:
            for process, _ in self.running.values():
                process.terminate()
                process.join()

    def _start(self, task: Task) -> None:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe(duplex=False)
        configs = [replace(self.sweep.plans[run].config, threads=1) for run in task.runs]
        given = (theirs, configs, task, self.skipped[task])
        process = spawn.Process(target=_worker, args=given)
        process.start()
        theirs.close()
        self.running[ours], self.at[task] = (process, task), None

    def _ended(self, pipe: Connection) -> list[Task]:
        """The task again, where its worker died."""
        process, task = self.running.pop(pipe)
        process.join()
        if process.exitcode == 0:
            return []
        path = self.at[task]
        self.deaths[task, path] += 1
        reason = f"the worker died with exit code {process.exitcode}"
        where = path.stem if path else f"{task.attack}, seed {task.seed}, before its first cell"
        self.progress.say(f"{where}: {reason}")
        if self.deaths[task, path] < TRIES:
            return [task]
        if path is None:
            return []
        for _, cell, file in self.sweep.cells():
            if file == path:
                crashed(cell, f"{reason}, {TRIES} times").write(path)
        self.tell("done", path)
        self.skipped[task] |= {str(path)}
        return [task]


def _answered(plan: Plan, cell: Cell, path: Path) -> bool:
    record = _read(path)
    return (
        not plan.config.force
        and record is not None
        and record.cell == cell
        and is_done(record, plan.reactivates(plan.attacks[0]))
    )


def _read(path: Path) -> Record | None:
    try:
        return read_record(path)
    except (OSError, Unreadable):
        return None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
