"""Scratch distillation: a fresh network taught by the suspect one on benign images alone.

A control: what needs no repair at all. Whatever a purifier keeps of the suspect network beyond
this, it has earned. Distillation after Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural
Network", 2015, arXiv:1503.02531; images are shifted at random, as far as they are in no recipe.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from purebench import DEFENSES, Defense, DefenseContext, fit
from purebench.model import reinitialise

from ._distil import distilling


@DEFENSES.register("scratch_distill")
@dataclass(frozen=True)
class ScratchDistill(Defense):
    """epochs, batch_size, lr: of SGD, with a cosine schedule.

    temperature: of the soft answers, above 0. share: of cross-entropy in the loss, 0 to 1.
    shift: images move at random by up to so many pixels (or the recipe's crop, if larger).
    """

    paper: ClassVar[str] = "control"
    epochs: int = 60
    batch_size: int = 64
    lr: float = 0.05
    temperature: float = 2.0
    share: float = 0.5
    shift: int = 2

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr <= 0 or self.temperature <= 0:
            raise ValueError(f"lr and temperature must be above 0, got {self}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie from 0 to 1, got {self.share}")
        if self.shift < 0:
            raise ValueError(f"shift must not be negative, got {self.shift}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        student = reinitialise(copy.deepcopy(model), ctx.derive("fresh weights"))
        recipe = replace(
            ctx.recipe,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="cosine",
            warmup=0.1,
            crop=max(self.shift, ctx.recipe.crop),
        )
        return fit(
            student,
            ctx.benign,
            recipe,
            seed=ctx.derive("distilling"),
            progress=ctx.progress,
            label="distilling",
            loss=distilling(model, self.temperature, self.share),
            notes=ctx.notes,
            static=True,
        )
