"""None: train on clean data, the control that tells what a defense costs who was never attacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import ATTACKS, Goal, PoisoningAttack


@ATTACKS.register("none")
@dataclass(frozen=True)
class NoAttack(PoisoningAttack):
    """Poisons nothing; its trigger leaves images as they are."""

    paper: ClassVar[str] = "control"
    poison_rate: ClassVar[float] = 0.0

    def poison_count(self, labels: Tensor, goal: Goal, rate: float) -> int:
        return 0

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        return nn.Identity()
