"""Serial: one task after another, in this process."""

from __future__ import annotations

from dataclasses import dataclass

from ..progress import Progress
from ..sweep import Sweep, Tell, work


@dataclass(frozen=True)
class Serial:
    """Has no options."""

    def run(self, sweep: Sweep, tell: Tell, progress: Progress) -> None:
        for task in sweep.tasks:
            work([sweep.plans[run] for run in task.runs], task, tell)
