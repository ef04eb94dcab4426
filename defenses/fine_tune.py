"""Fine-tuning: go on training all weights on the benign images alone.

The baseline of the field; settings follow BackdoorBench (Wu et al., NeurIPS 2022,
arXiv:2206.12654).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from purebench import DEFENSES, Defense, DefenseContext, Recipe, fit
from purebench.training import Loss


@DEFENSES.register("fine_tune")
@dataclass(frozen=True)
class FineTune(Defense):
    """epochs, batch_size, lr, momentum, weight_decay: of SGD with a cosine schedule.

    Augmentation is the recipe's.
    """

    paper: ClassVar[str] = "BackdoorBench, arXiv:2206.12654"
    epochs: int = 100
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        Recipe(self.epochs, self.batch_size, self.lr, self.momentum, self.weight_decay)

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        return self.tune(model, ctx)

    def tune(
        self, model: nn.Module, ctx: DefenseContext, loss: Loss | None = None, static: bool = True
    ) -> nn.Module:
        """Go on training ``model`` by ``loss``, cross-entropy unless given; static: see ``fit``."""
        recipe = ctx.recipe.tuning(
            self.epochs, self.batch_size, self.lr, self.momentum, self.weight_decay
        )
        seed = ctx.derive("fine_tune")
        return fit(
            model, ctx.benign, recipe, seed=seed, progress=ctx.progress, label="fine-tuning",
            loss=loss, notes=ctx.notes, static=static,
        )  # fmt: skip
