"""Learnable, imperceptible and robust attack (LIRA): a generator learns, along with the classifier,
a faint noise that opens the back door.

Khoa Doan, Yingjie Lao, Weijie Zhao, Ping Li, "LIRA: Learnable, Imperceptible and Robust Backdoor
Attacks", ICCV 2021. The attacker controls the training. First the generator, whose noise is bounded
in L-inf, and the classifier learn together; then the generator stays as it is and the classifier
learns on.

Ours departs in these. Both stages lie within the recipe's epochs and its schedule. The poisoned
images are drawn once, and only they are triggered; the authors trigger all, beside clean copies,
which pass the network by themselves, so that BatchNorm has statistics of each. The classifier
learns the generator's newest noise, not that of a copy which is renewed once an epoch. Noise is as
strong in the end as while the generator learns, and stronger than theirs, which is of normalised
images: .1 or .01, by the version of their code, is .05 or .005 of ours on MNIST and half of that on
CIFAR-10, and one version goes down to a tenth in the second stage. The generator's rate is 1e-4
there. The two losses are means, whatever the poison rate: the fewer images are triggered, the more
each of them weighs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import ATTACKS, Attack, AttackContext, BackdooredModel
from purebench.training import sgd

from ._control import Autocast, Batch, adam, descend, drawn, train
from ._generators import EncoderDecoder, depth, seeded


class NoiseTrigger(nn.Module):
    """x -> clip(x + eps * tanh(G(x))) on images (N, C, H, W) in [0, 1]."""

    def __init__(self, channels: int, width: int, eps: float) -> None:
        super().__init__()
        self.generator = EncoderDecoder(channels, channels, width=width, levels=depth(channels))
        self.eps = eps

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.tanh(self.generator(images).float())
        return (images + self.eps * noise).clamp(0, 1)


@ATTACKS.register("lira")
@dataclass(frozen=True)
class Lira(Attack):
    """eps: largest change of a pixel of images in [0, 1], 0 < eps <= 1.
    alpha: weight of the clean images' loss, 0 < alpha < 1; the triggered images' is the rest.
    joint: share of the steps in which the generator learns, 0 < joint <= 1.
    width: channels of the generator's first level, at least 1.
    lr: of the generator's Adam, above 0.
    """

    paper: ClassVar[str] = "Doan et al. 2021, ICCV"
    eps: float = 0.1
    alpha: float = 0.5
    joint: float = 0.5
    width: int = 8
    lr: float = 0.003

    def __post_init__(self) -> None:
        for name in ("eps", "joint"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must lie above 0 and be at most 1, got {getattr(self, name)}"
                )
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        with seeded(rng):
            trigger = NoiseTrigger(shape[0], self.width, self.eps)
        return trigger.to(memory_format=torch.channels_last)

    def run(self, ctx: AttackContext) -> BackdooredModel:
        indices = drawn(self, ctx)
        trigger = self.make_trigger(ctx.train.shape, ctx.generator("trigger")).to(ctx.device)
        model = ctx.build()
        recipe, drawing = ctx.recipe, replace(ctx.recipe, lr=self.lr)
        classifying, generating = sgd(recipe)(list(model.parameters())), adam(trigger, self.lr)

        def learn(batch: Batch, autocast: Autocast) -> Tensor:
            rates = {classifying: recipe.lr_at(batch.step, batch.steps)}
            last = self.joint * batch.steps
            if batch.step < last:
                rates[generating] = drawing.lr_at(batch.step, batch.steps)
            else:
                trigger.eval().requires_grad_(False)
            with autocast():
                loss = self.loss(model, trigger, batch, ctx)
            descend(loss, rates)
            return loss

        train(model, trigger, indices, ctx, learn, [classifying, generating])
        return BackdooredModel(model, trigger, ctx.goal, indices[0].cpu(), ctx.notes)

    def loss(
        self, model: nn.Module, trigger: nn.Module, batch: Batch, ctx: AttackContext
    ) -> Tensor:
        """The triggered and the clean images' mean losses, weighted; a batch may lack either."""
        count = batch.count
        marked = trigger(batch.images[:count]) if count else batch.images[:0]
        logits = model(torch.cat([marked, batch.images[count:]]))
        aims = torch.cat([ctx.goal.labels(batch.labels[:count]), batch.labels[count:]])
        losses = F.cross_entropy(logits, aims, reduction="none")
        backdoor, clean = (part.sum() / max(1, len(part)) for part in losses.tensor_split([count]))
        return self.alpha * clean + (1 - self.alpha) * backdoor
