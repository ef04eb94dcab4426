"""Ray: the machines of a cluster work off attack tasks, and the defense tasks that these lead to.

What a lost machine was doing is done again elsewhere. When this process ends, so do its tasks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from .. import interrupt
from ..errors import UsageError
from ..progress import Progress
from ..sweep import Sweep, Task, Tell, fulfil

PATIENCE_SECONDS = 60.0  # for Ray to answer
RETRIES = 3  # of a task whose worker or machine is lost


@dataclass(frozen=True)
class Ray:
    """address: of a cluster, or "auto" for the one that runs on this machine; "local" starts one.
    gpu_slots: tasks that share a GPU, at least 1; else, where this process has a GPU, 1."""

    address: str = "local"
    gpu_slots: int | None = None

    def run(self, sweep: Sweep, tell: Tell, progress: Progress) -> None:
        plan = sweep.plans[0]
        slots = self.gpu_slots or (1 if plan.device.type == "cuda" else None)
        with _connected(self.address):
            do = ray.remote(fulfil).options(
                num_cpus=plan.config.threads,
                num_gpus=1 / slots if slots else 0,
                max_retries=RETRIES,
            )
            running = {do.remote(sweep.order(task)): task for task in sweep.attack_tasks()}
            while running:
                interrupt.check()
                ended, _ = ray.wait([*running], num_returns=len(running), timeout=1.0)
                for reference in ended:
                    for task in _end(running.pop(reference), reference, sweep, tell, progress):
                        running[do.remote(sweep.order(task))] = task


def _end(task: Task, reference: Any, sweep: Sweep, tell: Tell, progress: Progress) -> list[Task]:
    """The defense tasks that a task's end leads to."""
    try:
        made: Sequence[Path] = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UsageError):
            raise error.cause from None
        raise UsageError(f"a worker could not begin: {str(error).splitlines()[-1]}") from error
    except RayError as error:
        progress.say(f"{task.attack}, seed {task.seed}: lost ({type(error).__name__})")
        made = sweep.lost(task, f"Ray gave it up: {type(error).__name__}", tell)
    for path in made:
        tell("done", path)
    rest = [path for path in task.records if path not in made]
    return sweep.defense_tasks(rest) if task.part == "attack" else []


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """UsageError where Ray is not there, or does not answer in time."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    errors = []

    def connect() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # whatever Ray makes of an address
            errors.append(error)

    thread = Thread(target=connect, daemon=True)  # init has no time limit of its own
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if thread.is_alive():
        raise UsageError(
            f"no answer from Ray at {address!r} within {PATIENCE_SECONDS:.0f} s; "
            "`ray status` on that machine says whether it runs"
        )
    if errors:
        raise UsageError(f"no Ray at {address!r}: {errors[0]}") from errors[0]
    try:
        yield
    finally:
        ray.shutdown()
