"""Slurm: attack tasks as an array of jobs, and defense tasks as another that waits for it.

Jobs go through submitit, which keeps its files and the jobs' output in ``slurm`` in the output
folder. One whose time has run out is queued again, and its training goes on from its last epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from .. import interrupt
from ..errors import UsageError
from ..progress import Progress
from ..sweep import Order, Sweep, Task, Tell, fulfil

ARRAY = 1000  # jobs in one array; clusters allow 1001 unless they say otherwise
POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Slurm:
    """jobs: at once of each array, at least 1. slurm: sbatch's options by submitit's names;
    ``time``, in minutes, must be one."""

    jobs: int | None = None
    slurm: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.slurm.get("time", "").isdecimal():
            raise UsageError("executor slurm needs --slurm time=MINUTES, of one job at most")

    def run(self, sweep: Sweep, tell: Tell, progress: Progress) -> None:
        queue = self._queue(sweep)
        jobs: dict[Any, Task] = {}
        try:
            for attacks in _arrays(sweep.attack_tasks()):
                array = _submit(queue, sweep, attacks)
                first = array[0].job_id.split("_")[0]
                queue.update_parameters(dependency=f"afterany:{first}")
                defenses = sweep.defense_tasks(p for task in attacks for p in task.records[1:])
                jobs |= dict(zip(array, attacks, strict=True))
                if defenses:
                    jobs |= dict(zip(_submit(queue, sweep, defenses), defenses, strict=True))
                queue.update_parameters(dependency=None)
                progress.say(f"Slurm array {first}: {len(attacks)} victims, and their defenses")
            while jobs:
                interrupt.check()
                for job in [job for job in jobs if job.done()]:
                    _end(jobs.pop(job), job, sweep, tell, progress)
                time.sleep(POLL_SECONDS if jobs else 0)
        finally:
            for job in jobs:
                job.cancel(check=False)

    def _queue(self, sweep: Sweep) -> Any:
        given = {key: int(text) if text.isdigit() else text for key, text in self.slurm.items()}
        if self.jobs is not None:
            given["array_parallelism"] = self.jobs
        options = {"job_name": "purebench", "cpus_per_task": sweep.plans[0].config.threads, **given}
        try:
            queue = submitit.SlurmExecutor(folder=sweep.plans[0].output.resolve() / "slurm")
            queue.update_parameters(**options)
        except RuntimeError as error:
            raise UsageError("executor slurm: no srun here, start it on the cluster") from error
        except ValueError as error:
            raise UsageError(f"--slurm: {error}".partition("\n")[0]) from error
        return queue


class _Job:
    """A job's work, which Slurm may stop and begin again."""

    def __call__(self, order: Order) -> list[Path] | UsageError:
        try:
            return fulfil(order)
        except UsageError as error:
            return error

    def checkpoint(self, order: Order) -> Any:
        return DelayedSubmission(self, order)


def _arrays(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Victims whose cells fit one array, unless one alone has more."""
    array: list[Task] = []
    for task in tasks:
        if array and sum(len(each.records) for each in [*array, task]) > ARRAY:
            yield array
            array = []
        array.append(task)
    if array:
        yield array


def _submit(queue: Any, sweep: Sweep, tasks: Sequence[Task]) -> list[Any]:
    try:
        jobs: list[Any] = queue.map_array(_Job(), [sweep.order(task) for task in tasks])
    except (FailedJobError, FailedSubmissionError) as error:
        raise UsageError(f"sbatch refuses: {error}") from error
    return jobs


def _end(task: Task, job: Any, sweep: Sweep, tell: Tell, progress: Progress) -> None:
    if job.exception() is not None:
        progress.say(f"job {job.job_id} was lost: see {job.paths.stderr}")
        sweep.lost(task, f"Slurm job lost, its state {job.state}", tell)
        return
    made = job.result()
    if isinstance(made, UsageError):
        raise made
    for path in made:
        tell("done", path)
