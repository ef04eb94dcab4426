"""Self-distillation: the suspect network trained towards its own answers at a high rate.

A control: the last step of ``robust_recovery`` without the recovery before it. What recovery adds
is the difference. Distillation after Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural
Network", 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from purebench import DEFENSES, Defense, DefenseContext

from ._distil import rewritten


@DEFENSES.register("self_distill")
@dataclass(frozen=True)
class SelfDistill(Defense):
    """steps, lr: of SGD with a cosine schedule; rates are tried in turn, until one does not cost
    too much.
    """

    paper: ClassVar[str] = "control"
    default: ClassVar[bool] = False
    revision: ClassVar[int] = 4
    steps: int = 1200
    lr: tuple[float, ...] = (0.1, 0.03)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.lr or min(self.lr) <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        return rewritten(model, ctx, self.steps, self.lr)
