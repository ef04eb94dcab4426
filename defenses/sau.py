"""Shared adversarial unlearning (SAU): unlearn adversarial images that fool the suspect and the
purified network alike.

Wei, Zhang, Zha, Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared
Adversarial Examples", NeurIPS 2023, arXiv:2307.10562. Ours takes 300 steps of 128 images, however
many benign images there are; the authors 100 passes over 2,500, about 1,000 steps of 256. BatchNorm
works by its running statistics and keeps them, for benign images as for adversarial ones: else the
network would learn to tell the two by their statistics.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, Defense, DefenseContext, Recipe, fit
from purebench.adversarial import ascend
from purebench.evaluate import evaluating
from purebench.seeding import generator

from ._unlikely import unlikely


@DEFENSES.register("sau")
@dataclass(frozen=True)
class SAU(Defense):
    """updates, batch_size, lr: of Adam, with a constant learning rate; whole epochs are taken.
    eps: L-inf radius of the perturbations in [0, 1], above 0. step, steps: of their search, above 0
        and at least 1.
    adversarial: in the search, weight of fooling either network; shared: of fooling both alike;
        neither negative.
    benign, robust, unlearn: in the loss, weights of benign images, of adversarial ones with their
        true labels, and of not giving them the suspect network's wrong ones; none negative.
    """

    paper: ClassVar[str] = "Wei et al. 2023, arXiv:2307.10562"
    revision: ClassVar[int] = 2
    default: ClassVar[bool] = False
    updates: int = 300
    batch_size: int = 128
    lr: float = 1e-4
    eps: float = 0.2
    step: float = 0.2
    steps: int = 5
    adversarial: float = 0.01
    shared: float = 1.0
    benign: float = 1.0
    robust: float = 0.0
    unlearn: float = 1.0

    def __post_init__(self) -> None:
        Recipe(1, self.batch_size, self.lr)
        if self.eps <= 0 or self.step <= 0:
            raise ValueError(f"eps and step must be above 0, got {self.eps} and {self.step}")
        for name in ("updates", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("adversarial", "shared", "benign", "robust", "unlearn"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        suspect = copy.deepcopy(model).eval()
        rng = generator(ctx.seed, "start", device=ctx.benign.images.device)
        recipe = replace(
            ctx.recipe,
            epochs=max(1, round(self.updates / -(-len(ctx.benign) // self.batch_size))),
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="constant",
            warmup=0.0,
        )

        def unlearning(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            def fooled(hard: Tensor) -> Tensor:
                answers = model(hard), suspect(hard)
                errors = sum(F.cross_entropy(a, labels, reduction="sum") for a in answers) / 2
                return self.adversarial * errors - self.shared * divergence(*answers).sum()

            with evaluating(model):
                hard = ascend(
                    fooled, images, eps=self.eps, step=self.step, steps=self.steps, rng=rng
                )
                usual, answers = model(images), model(hard)
            with torch.no_grad():
                wrong = suspect(hard).argmax(1)
            return (
                self.benign * F.cross_entropy(usual, labels)
                + self.robust * F.cross_entropy(answers, labels)
                + self.unlearn * unlearning_loss(answers, labels, wrong)
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


def unlearning_loss(logits: Tensor, labels: Tensor, wrong: Tensor) -> Tensor:
    """-log(1 - p(wrong)) where ``wrong`` (N,), the suspect network's answer, is not the label, else
    0; the mean."""
    return (unlikely(logits, wrong) * (wrong != labels)).mean()


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two networks' answers, from logits (N, K): (N,), in nats."""
    logs = first.log_softmax(1), second.log_softmax(1)
    middle = torch.logaddexp(*logs) - torch.log(torch.tensor(2.0))
    parts = [(log.exp() * (log - middle)).sum(1) for log in logs]
    return (parts[0] + parts[1]) / 2
