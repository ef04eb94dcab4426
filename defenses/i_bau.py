"""Implicit backdoor adversarial unlearning (I-BAU): unlearn the one perturbation that hurts most,
and mind that it moves with the weights.

Zeng, Chen, Park, Mao, Jin, Jia, "Adversarial Unlearning of Backdoors via Implicit Hypergradient",
ICLR 2022, arXiv:2110.03735. Settings are those of the authors' code, in which one image in a
hundred is perturbed, the paper's L2 radius of 10 is left out, and images are not augmented. Ours
takes the mean over which images those are: the loss is 99 parts of all images as they are, one of
all of them perturbed. BatchNorm works by its running statistics and keeps them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, Defense, DefenseContext, Recipe, fit
from purebench.evaluate import evaluating
from purebench.training import batches

from ._hypergradient import implicit


@DEFENSES.register("i_bau")
@dataclass(frozen=True)
class IBAU(Defense):
    """rounds: each finds the perturbation anew and unlearns it on all benign images, at least 1.
    batch_size, lr: of Adam on the weights.
    share: of the loss that is on perturbed images, 0 to 1.
    rms: largest root mean square of the perturbation, of pixels in [0, 1], above 0; none bounds it
        by the penalty alone.
    inner_lr: of the gradient ascent, a pass over the benign images a round, above 0.
    penalty: of the perturbation's squared norm, 0 or more.
    terms: of the series for the implicit slope, beyond the first, 0 or more.
    implicit_step: of the fixed-point map behind that series, above 0.
    """

    paper: ClassVar[str] = "Zeng et al. 2022, arXiv:2110.03735"
    revision: ClassVar[int] = 2
    default: ClassVar[bool] = False
    rounds: int = 5
    batch_size: int = 100
    lr: float = 1e-3
    share: float = 0.01
    rms: float | None = None
    inner_lr: float = 10.0
    penalty: float = 1e-3
    terms: int = 5
    implicit_step: float = 0.1

    def __post_init__(self) -> None:
        Recipe(self.rounds, self.batch_size, self.lr)
        for name in ("rms", "inner_lr", "implicit_step"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie from 0 to 1, got {self.share}")
        for name in ("penalty", "terms"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        recipe = replace(
            ctx.recipe,
            epochs=self.rounds,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="constant",
            warmup=0.0,
            crop=0,
            flip=False,
        )
        worst = torch.zeros(ctx.benign.shape, device=ctx.benign.images.device)
        per_round, count = -(-len(ctx.benign) // self.batch_size), itertools.count()
        lengths = ctx.notes["perturbation_norm_by_round"] = []

        def unlearning(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            nonlocal worst
            number, batch = divmod(next(count), per_round)
            with evaluating(model):
                if batch == 0:
                    again = batches(ctx.benign, recipe, ctx.derive("perturbation"), number)
                    worst = self.perturbation(model, again, ctx.benign.shape)
                    lengths.append(round(float(worst.norm()), 4))
                hurt = partial(perturbed_loss, model, images, labels)
                benign = F.cross_entropy(model(images), labels)
                return implicit(
                    lambda change: torch.lerp(benign, hurt(change), self.share),
                    lambda change: self.penalty * change.square().sum() - hurt(change),
                    worst,
                    step=self.implicit_step,
                    terms=self.terms,
                )

        return fit(
            model,
            ctx.benign,
            recipe,
            seed=ctx.derive("unlearning"),
            progress=ctx.progress,
            label="unlearning",
            loss=unlearning,
            descent=torch.optim.Adam,
            notes=ctx.notes,
        )

    def perturbation(
        self, model: nn.Module, parts: Iterable[tuple[Tensor, Tensor]], shape: torch.Size
    ) -> Tensor:
        """The one change of all images (C, H, W) that raises the loss, after a pass over them."""
        change = next(model.parameters()).new_zeros(shape)
        radius = (self.rms or float("inf")) * shape.numel() ** 0.5
        for images, labels in parts:
            change.requires_grad_()
            loss = perturbed_loss(model, images, labels, change)
            (slope,) = torch.autograd.grad(loss - self.penalty * change.square().sum(), change)
            change = change.detach() + self.inner_lr * slope
            change *= (radius / change.norm().clamp_min(1e-12)).clamp(max=1)
        return change


def perturbed_loss(model: nn.Module, images: Tensor, labels: Tensor, change: Tensor) -> Tensor:
    """Cross-entropy on the images with ``change``, as the network sees it: unclipped."""
    return F.cross_entropy(model(images + change), labels)
