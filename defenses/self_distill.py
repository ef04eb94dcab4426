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
    """steps, lr: of SGD, above 0, with a cosine schedule. What ``rewritten`` finds to cost too
    much is not taken.
    """

    paper: ClassVar[str] = "control"
    default: ClassVar[bool] = False
    revision: ClassVar[int] = 2
    steps: int = 1200
    lr: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        return rewritten(model, ctx, self.steps, self.lr)
