"""Anti-backdoor learning (ABL): train anew, set aside the images that are learned suspiciously
fast, and unlearn them.

Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021, arXiv:2110.11571. For the first part of training the mean loss of a batch is held at
``floor`` by flooding, as the authors' code does: poisoned images go far below it, and clean ones
make up for them. Those with the lowest loss are isolated. Training goes on with the rest, and ends
with descent on the rest and ascent on the isolated, as their formula has it.
Ours divides the recipe's epochs, which may be two, at least one to each part. It unlearns by
-log(1 - p) in the place of log p, whose slope vanishes where the network is as sure as it is of the
isolated, and only while an image is still given its label. The network is that of the last epoch
of unlearning which leaves benign accuracy within the budget, or the one before the first. Of the
images, 5 % are isolated, not 1 %: at a poison rate of 10 % on MNIST, the lowest 1 % are triggered
images of the target class itself, from which only that class can be unlearnt. What is not learned
first, as a warp is not (wanet), is not isolated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, Defense, DefenseContext, Recipe, Split, Verdict, fit
from purebench.evaluate import accuracy, evaluating
from purebench.model import reinitialise
from purebench.training import Loss, batches, cross_entropy

from ._suspect import image_losses, suspect_split
from ._unlikely import unlikely


@DEFENSES.register("abl")
@dataclass(frozen=True)
class ABL(Defense):
    """floor: that a batch's mean loss is held at in the first part, above 0.

    first: share of the recipe's epochs in that part, 0 < first < 1.
    isolated: share of the images set aside, 0 < isolated < 1.
    ascent_epochs, ascent_lr: of the unlearning; at least 1, and above 0.
    budget: benign accuracy that unlearning may cost, 0 or more.
    """

    paper: ClassVar[str] = "Li et al. 2021, arXiv:2110.11571"
    revision: ClassVar[int] = 2
    default: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"training_set"})
    floor: float = 0.5
    first: float = 0.2
    isolated: float = 0.05
    ascent_epochs: int = 10
    ascent_lr: float = 2e-3
    budget: float = 0.05

    def __post_init__(self) -> None:
        for name in ("first", "isolated"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.floor <= 0 or self.ascent_lr <= 0:
            raise ValueError(
                f"floor and ascent_lr must be above 0, got {self.floor} and {self.ascent_lr}"
            )
        if self.ascent_epochs < 1 or self.budget < 0:
            raise ValueError(
                f"ascent_epochs must be at least 1 and budget not negative, got "
                f"{self.ascent_epochs} and {self.budget}"
            )

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        def train(
            model: nn.Module, part: Split, recipe: Recipe, label: str, loss: Loss
        ) -> nn.Module:
            seed = ctx.derive(label)
            return fit(
                model, part, recipe, seed=seed, progress=ctx.progress, label=label, loss=loss,
                static=True,
            )  # fmt: skip

        split = suspect_split(ctx)
        early = max(1, round(self.first * ctx.recipe.epochs))
        late = max(1, ctx.recipe.epochs - early)
        fresh = reinitialise(model, ctx.derive("fresh weights"))
        train(fresh, split, replace(ctx.recipe, epochs=early), "first part", self.flooded)
        scores = -image_losses(model, split, partial(F.cross_entropy, reduction="none"))
        lowest = max(1, round(self.isolated * len(split)))
        flagged = torch.zeros_like(split.labels, dtype=torch.bool)
        flagged[scores.argsort(descending=True, stable=True)[:lowest]] = True
        ctx.notes["isolated"], ctx.verdict = lowest, Verdict(flagged, scores)
        rest, isolated = (split[torch.nonzero(part).flatten()] for part in (~flagged, flagged))
        train(model, rest, replace(ctx.recipe, epochs=late), "second part", cross_entropy)
        self.unlearn(model, isolated, rest, ctx)
        ctx.notes["isolated_recognised"] = round(accuracy(model, isolated), 6)
        return model

    def unlearn(self, model: nn.Module, isolated: Split, rest: Split, ctx: DefenseContext) -> None:
        """In place, up to the last epoch that leaves benign accuracy within the budget."""
        recipe = replace(ctx.recipe, epochs=1, lr=self.ascent_lr, schedule="constant", warmup=0.0)
        seed = ctx.derive("rest")
        stream = (batch for epoch in count() for batch in batches(rest, recipe, seed, epoch))

        def both_ways(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            with evaluating(model):  # the isolated are not to move BatchNorm's statistics
                return forget(model, images, labels) + cross_entropy(model, *next(stream))

        floor = accuracy(model, ctx.benign) - self.budget
        last, kept = 0, copy.deepcopy(model.state_dict())
        for epoch in range(self.ascent_epochs):
            fit(
                model,
                isolated,
                recipe,
                seed=ctx.derive("unlearning", epoch),
                progress=ctx.progress.without_bars(),
                loss=both_ways,
            )
            if accuracy(model, ctx.benign) >= floor:
                last, kept = epoch + 1, copy.deepcopy(model.state_dict())
        model.load_state_dict(kept)
        ctx.notes["unlearning_epochs"] = last

    def flooded(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, which turns round where it is below ``floor``."""
        return (cross_entropy(model, images, labels) - self.floor).abs() + self.floor


def forget(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p(label)) of images that are given their labels, and 0 of the others; the mean."""
    logits = model(images)
    recognised = logits.argmax(1) == labels
    loss: Tensor = unlikely(logits, labels) * recognised
    return loss.mean()
