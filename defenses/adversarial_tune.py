"""Adversarial tuning: fine-tune on benign images and on adversarial ones made from them.

Zeyuan Allen-Zhu, Yuanzhi Li, "Feature Purification: How Adversarial Training Performs Robust Deep
Learning", FOCS 2021, arXiv:2005.10190: adversarial training purifies the dense mixtures out of
features that clean training finds. The field tries the same on back doors. Adversarial images are
PGD's, or with ``steps=1`` and ``step=eps`` FGM's; half of the loss is on benign ones. BatchNorm
works by its running statistics and keeps them, for both halves alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, DefenseContext
from purebench.adversarial import Norm, pgd
from purebench.evaluate import evaluating
from purebench.seeding import generator

from .fine_tune import FineTune


@DEFENSES.register("adversarial_tune")
@dataclass(frozen=True)
class AdversarialTune(FineTune):
    """eps: radius of the perturbations in units of 1/255, in the norm ``norm``, above 0.
    norm: "linf" or "l2", over an image's pixels.
    step, steps: of PGD from a random start; a step in units of 1/255, above 0.
    The others: see ``fine_tune``.
    """

    paper: ClassVar[str] = "Allen-Zhu and Li 2020, arXiv:2005.10190"
    default: ClassVar[bool] = False
    epochs: int = 10
    eps: float = 8.0
    norm: Norm = "linf"
    step: float = 2.0
    steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps <= 0 or self.step <= 0:
            raise ValueError(f"eps and step must be above 0, got {self.eps} and {self.step}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        rng = generator(ctx.seed, "start", device=ctx.benign.images.device)

        def robust(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            with evaluating(model):
                hard = pgd(
                    model,
                    images,
                    labels,
                    eps=self.eps / 255,
                    step=self.step / 255,
                    steps=self.steps,
                    norm=self.norm,
                    rng=rng,
                )
                both = [F.cross_entropy(model(part), labels) for part in (images, hard)]
            return (both[0] + both[1]) / 2

        return self.tune(model, ctx, robust, static=False)  # draws from a generator of its own
