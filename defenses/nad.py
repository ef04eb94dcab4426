"""Neural attention distillation (NAD): fine-tune a teacher, then train the network until it looks
where the teacher looks.

Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks", ICLR 2021, arXiv:2101.05930. The loss is cross-entropy plus, at the last three
stages of the network, beta times the distance of its attention maps from the teacher's. A stage
ends where the size of the feature map changes; the last map is taken before global pooling, where
the term would be dead. Networks with fewer stages have the last of the betas; without a map of more
than one position there is nothing to attend to. Betas and epochs are the authors': 500, 1000 and
1000 for means over maps of 32x32, 16x16 and 8x8, here as weights of sums. Their rate is .1 for two
epochs and then .01; ours falls as a cosine after a warm-up, and batches are half as large, so that
a hundred images, too, make enough steps. A tenth of the rate leaves MNIST's back doors whole: the
fine-tuned teacher then keeps them, and teaches them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, Defense, DefenseContext, NotApplicable, fit
from purebench.training import Loss

from ._attention import attention_distance, stages
from ._watch import watching


@DEFENSES.register("nad")
@dataclass(frozen=True)
class NAD(Defense):
    """betas: weights of the last stages' terms, 0 or more; the last one is the deepest stage's.

    power: of the activations, above 0. teacher_epochs, epochs: of fine-tuning the teacher and of
    distilling. batch_size, lr: of both, with momentum 0.9 and weight decay 5e-4.
    """

    paper: ClassVar[str] = "Li et al. 2021, arXiv:2101.05930"
    revision: ClassVar[int] = 2
    default: ClassVar[bool] = False
    betas: tuple[float, ...] = (500 / 1024, 1000 / 256, 1000 / 64)
    power: float = 2.0
    teacher_epochs: int = 10
    epochs: int = 10
    batch_size: int = 32
    lr: float = 0.1

    def __post_init__(self) -> None:
        for name in ("teacher_epochs", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("power", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.betas or min(self.betas) < 0:
            raise ValueError(f"betas must be one or more, none negative, got {self.betas}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        names = stages(model, ctx.benign.images)[-len(self.betas) :]
        if not names:
            raise NotApplicable("no feature map of the network has more than one position")
        recipe = ctx.recipe.tuning(self.teacher_epochs, self.batch_size, self.lr, warmup=0.2)
        teacher = fit(
            copy.deepcopy(model), ctx.benign, recipe, seed=ctx.derive("teacher"),
            progress=ctx.progress, label="teacher", static=True,
        )  # fmt: skip
        ctx.notes["stages"] = names
        return fit(
            model, ctx.benign, replace(recipe, epochs=self.epochs), seed=ctx.derive("student"),
            progress=ctx.progress, label="student", notes=ctx.notes, static=True,
            loss=attending(teacher, names, self.betas[-len(names) :], self.power),
        )  # fmt: skip


def attending(teacher: nn.Module, names: list[str], betas: tuple[float, ...], power: float) -> Loss:
    """A loss for ``fit``: cross-entropy, and ``betas`` times the distance of the attention maps
    of the modules ``names`` from those of ``teacher``, which is in evaluation mode."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted, _ = features(teacher, names, images)
        given, logits = features(model, names, images)
        total = F.cross_entropy(logits, labels)
        for beta, mine, his in zip(betas, given, wanted, strict=True):
            total = total + beta * attention_distance(mine, his, power)
        return total

    return loss


def features(model: nn.Module, names: list[str], images: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the modules ``names`` give on float images, and the logits."""
    modules = [model.get_submodule(name) for name in names]
    with watching(modules) as seen:
        logits = model(images)
    return [seen[module][1] for module in modules], logits
