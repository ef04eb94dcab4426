"""ABL: train anew, set aside the images that are learned suspiciously fast, and unlearn them.

Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021, arXiv:2110.11571. For the first part of training a loss below ``floor`` is pushed up
again, which keeps clean images there and lets poisoned ones fall further; those with the lowest
loss are isolated. Training goes on with the rest, and ends with gradient ascent on the isolated.
Ours divides the recipe's epochs, which may be two, at least one to each part. It unlearns by
-log(1 - p) in the place of log p, whose slope vanishes where the network is as sure as it is of the
isolated, and only while an image is still given its label. Unlearning ends where that holds of
none; an epoch that costs more benign accuracy than the budget is undone, and ends it too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, Defense, DefenseContext, Recipe, Split, Verdict, fit
from purebench.data import to_float
from purebench.evaluate import accuracy, evaluating
from purebench.model import reinitialise
from purebench.training import Loss, cross_entropy

from ._suspect import suspect_split
from ._unlikely import unlikely

_BATCH = 500  # images a forward pass


@DEFENSES.register("abl")
@dataclass(frozen=True)
class ABL(Defense):
    """floor: loss below which an image's sign is turned in the first part, above 0.

    first: share of the recipe's epochs in that part, 0 < first < 1.
    isolated: share of the images set aside, 0 < isolated < 1.
    ascent_epochs, ascent_lr: of the unlearning, at most; at least 1, and above 0.
    budget: benign accuracy that unlearning may cost, 0 or more.
    """

    paper: ClassVar[str] = "Li et al. 2021, arXiv:2110.11571"
    default: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"training_set"})
    floor: float = 0.5
    first: float = 0.2
    isolated: float = 0.01
    ascent_epochs: int = 20
    ascent_lr: float = 5e-4
    budget: float = 0.02

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
                model, part, recipe, seed=seed, progress=ctx.progress, label=label, loss=loss
            )

        split = suspect_split(ctx)
        early = max(1, round(self.first * ctx.recipe.epochs))
        late = max(1, ctx.recipe.epochs - early)
        fresh = reinitialise(model, ctx.derive("fresh weights"))
        train(fresh, split, replace(ctx.recipe, epochs=early), "first part", self.held)
        scores = -image_losses(model, split)
        count = max(1, round(self.isolated * len(split)))
        flagged = torch.zeros_like(split.labels, dtype=torch.bool)
        flagged[scores.argsort(descending=True, stable=True)[:count]] = True
        ctx.notes["isolated"], ctx.verdict = count, Verdict(flagged, scores)
        rest, isolated = (split[torch.nonzero(part).flatten()] for part in (~flagged, flagged))
        train(model, rest, replace(ctx.recipe, epochs=late), "second part", cross_entropy)
        self.unlearn(model, isolated, ctx)
        ctx.notes["isolated_recognised"] = round(accuracy(model, isolated), 6)
        return model

    def unlearn(self, model: nn.Module, isolated: Split, ctx: DefenseContext) -> None:
        """Epoch by epoch in place, as long as benign accuracy stays within the budget."""
        recipe = replace(
            ctx.recipe, epochs=1, lr=self.ascent_lr, schedule="constant", warmup=0.0, momentum=0.0
        )
        floor = accuracy(model, ctx.benign) - self.budget
        ctx.notes["unlearning_epochs"] = 0
        for epoch in range(self.ascent_epochs):
            if accuracy(model, isolated) == 0:
                return
            kept = {name: value.clone() for name, value in model.state_dict().items()}
            seed = ctx.derive("unlearning", epoch)
            fit(
                model,
                isolated,
                recipe,
                seed=seed,
                progress=ctx.progress.without_bars(),
                loss=forget,
            )
            if accuracy(model, ctx.benign) < floor:
                model.load_state_dict(kept)
                return
            ctx.notes["unlearning_epochs"] = epoch + 1

    def held(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, of which each image's part turns its sign below ``floor``."""
        losses: Tensor = F.cross_entropy(model(images), labels, reduction="none")
        return ((losses - self.floor).sign() * losses).mean()


def forget(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p(label)) of images that are given their labels; by the running statistics of
    BatchNorm, which these images are not to move."""
    with evaluating(model):
        logits = model(images)
    recognised = logits.argmax(1) == labels
    loss: Tensor = unlikely(logits, labels) * recognised
    return loss.mean()


@torch.no_grad()
def image_losses(model: nn.Module, split: Split) -> Tensor:
    """Cross-entropy (N,) of every image, in evaluation mode."""
    parts = zip(split.images.split(_BATCH), split.labels.split(_BATCH), strict=True)
    return torch.cat([F.cross_entropy(model(to_float(x)), y, reduction="none") for x, y in parts])
