"""Reconstructive neuron pruning (RNP): unlearn the benign images, see which channels cannot bring
them back, prune those.

Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023,
arXiv:2305.14876. A copy of the network unlearns by gradient ascent; masks on its channels, see
``_masks``, then descend alpha times the loss; the network itself loses the channels whose mask fell
below a threshold. Steps are as many as the authors take, 20 epochs of 500 images at most, whatever
the number of images. Ours departs in three points. Unlearning stops within an epoch, as soon as the
accuracy has been reached. The authors give no rule for the threshold (their code lists them all,
with test ASR): ours is the largest of 0, 0.05, ... 0.95 that leaves the accuracy on benign images
that no mask was learnt on within the budget, ``anp``'s. The masks' learning rate is a tenth of
theirs (0.2), which is for thousands of channels: of the 136 of small_cnn it sends 28 to 45 to zero.

It rests on an unlearnt network seeing the target class everywhere, for the back door is what is
left of it. small_cnn, once it has unlearnt MNIST at this rate or a tenth of it, sees a 4, a 7 or an
8 instead (seeds 10 and 11, badnets and blend, target 0): the masks then fall on clean channels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, Defense, DefenseContext

from ._masks import Masks, prune_masked
from ._unlearn import unlearn


@DEFENSES.register("rnp")
@dataclass(frozen=True)
class RNP(Defense):
    """batch_size: of unlearning and recovering.

    unlearn_lr, unlearn_steps: of gradient ascent, with momentum 0.9 and weight decay 5e-4.
    floor: benign accuracy at which it stops, 0 to 1; chance where that is more.
    recover_lr, recover_steps: of the masks, with momentum 0.9. alpha: factor of their loss.
    budget: benign accuracy that pruning may cost, 0 to 1.
    holdout: share of the benign images that both accuracies are measured on, between 0 and 1.
    """

    paper: ClassVar[str] = "Li et al. 2023, arXiv:2305.14876"
    revision: ClassVar[int] = 2
    default: ClassVar[bool] = False
    batch_size: int = 128
    unlearn_lr: float = 0.01
    unlearn_steps: int = 80
    floor: float = 0.2
    recover_lr: float = 0.02
    recover_steps: int = 80
    alpha: float = 0.2
    budget: float = 0.1
    holdout: float = 0.2

    def __post_init__(self) -> None:
        for name in ("batch_size", "unlearn_steps", "recover_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("unlearn_lr", "recover_lr", "alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("floor", "budget"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must lie between 0 and 1, got {self.holdout}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        split, validation = ctx.holdout(self.holdout)
        masks = Masks(copy.deepcopy(model))
        recipe = replace(
            ctx.recipe,
            batch_size=self.batch_size,
            lr=self.unlearn_lr,
            momentum=0.9,
            weight_decay=5e-4,
        )
        facts = unlearn(
            masks.model, split, validation, recipe,
            floor=max(self.floor, 1 / ctx.num_classes),
            steps=self.unlearn_steps, clip=20.0, seed=ctx.derive("unlearning"),
            progress=ctx.progress,
        )  # fmt: skip

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            return self.alpha * F.cross_entropy(masks.logits(images, masks.values), labels)

        found = masks.learn(
            loss, split, replace(recipe, lr=self.recover_lr), steps=self.recover_steps,
            seed=ctx.derive("recovering"), progress=ctx.progress, label="recovering",
        )  # fmt: skip
        ctx.notes.update(facts)
        ctx.notes.update(prune_masked(model, found, validation, self.budget))
        return model
