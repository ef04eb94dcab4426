"""Pruning: silence the channels of the last convolution that benign images leave idle.

The first half of Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on
Deep Neural Networks", RAID 2018, arXiv:1805.12185. A channel is silenced in its BatchNorm where it
has one; where a shortcut's outputs are added to it, in the sum, as in BackdoorBench. How many are
pruned is decided on a held-out part of the benign images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from purebench import DEFENSES, Defense, DefenseContext

from ._channels import prune_inactive


@DEFENSES.register("prune")
@dataclass(frozen=True)
class Prune(Defense):
    """budget: benign accuracy that may be lost, 0 <= budget < 1.

    holdout: share of the benign images that it is measured on, 0 < holdout < 1.
    steps: how often accuracy is tested on the way, at least 2.
    """

    paper: ClassVar[str] = "Liu et al. 2018, arXiv:1805.12185"
    budget: float = 0.02
    holdout: float = 0.2
    steps: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.budget < 1:
            raise ValueError(f"budget must be at least 0 and below 1, got {self.budget}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must lie between 0 and 1, got {self.holdout}")
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        fit, validation = ctx.holdout(self.holdout)
        ctx.notes.update(prune_inactive(model, fit, validation, self.budget, self.steps))
        return model
