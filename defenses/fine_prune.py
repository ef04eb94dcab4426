"""Fine-pruning: prune what benign images leave idle, then fine-tune what is left.

Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018, arXiv:1805.12185. Pruning stops on a held-out part of the benign images;
fine-tuning uses all of them and leaves pruned channels silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from purebench import DEFENSES, DefenseContext

from ._channels import last_channels
from .fine_tune import FineTune
from .prune import Prune


@DEFENSES.register("fine_prune")
@dataclass(frozen=True)
class FinePrune(FineTune):
    """budget, holdout, steps: of pruning, see ``prune``; the others: see ``fine_tune``."""

    paper: ClassVar[str] = "Liu et al. 2018, arXiv:1805.12185"
    budget: float = 0.1
    holdout: float = 0.2
    steps: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        Prune(self.budget, self.holdout, self.steps)

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        Prune(self.budget, self.holdout, self.steps).purify(model, ctx)
        channels = last_channels(model, ctx.benign.images)
        with channels.held(torch.tensor(ctx.notes["pruned"], dtype=torch.long)):
            return super().purify(model, ctx)
