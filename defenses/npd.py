"""Neural polarizer defense (NPD): a linear layer behind the last convolution that lets benign
features pass, and no others.

Zhu, Wei, Zha, Wu, "Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying
Poisoned Features", NeurIPS 2023, arXiv:2306.16697. All else is frozen. As the true target is
unknown, each benign image is pushed towards its own second choice. Ours folds the layer into the
convolution, whose output it maps, so that the network keeps its shape; it has no BatchNorm of its
own, and starts from the identity. The authors' L2 radius of 3 is for 3x32x32 images; ours is the
same change of a pixel. The search is that of BackdoorBench's code (arXiv:2206.12654), which ends as
soon as most of a batch is where it is pushed. Ours takes 10 epochs of their 55, at one rate.
BatchNorm works by its running statistics and keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, Defense, DefenseContext, NotApplicable, Recipe, fit
from purebench.adversarial import nearest

from ._channels import last_channels
from ._passes import with_weights
from ._unlikely import unlikely

Network = Callable[[Tensor], Tensor]


@DEFENSES.register("npd")
@dataclass(frozen=True)
class NPD(Defense):
    """epochs, batch_size, lr, momentum, weight_decay: of SGD at a constant rate.
    rms: largest root mean square of the perturbations, of pixels in [0, 1], above 0.
    step, steps: of their search by the gradient's sign; a step is a change of a pixel, above 0.
    enough: share of a batch, 0 to 1; no more steps once so many are where they are pushed.
    avoid: weight of not giving perturbed images what they were pushed towards; robust: of giving
        them their true labels with a margin; neither negative.
    """

    paper: ClassVar[str] = "Zhu et al. 2023, arXiv:2306.16697"
    revision: ClassVar[int] = 2
    default: ClassVar[bool] = False
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rms: float = 0.054
    step: float = 0.1
    steps: int = 2
    enough: float = 0.6
    avoid: float = 0.4
    robust: float = 0.4

    def __post_init__(self) -> None:
        Recipe(self.epochs, self.batch_size, self.lr, self.momentum, self.weight_decay)
        if self.rms <= 0 or self.step <= 0:
            raise ValueError(f"rms and step must be above 0, got {self.rms} and {self.step}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.enough <= 1:
            raise ValueError(f"enough must lie from 0 to 1, got {self.enough}")
        if self.avoid < 0 or self.robust < 0:
            raise ValueError(
                f"avoid and robust must not be negative, got {self.avoid} and {self.robust}"
            )

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        place = last_channels(model, ctx.benign.images)
        if place.conv.groups != 1:
            raise NotApplicable(f"the last convolution, {place.name}, has groups")
        frozen = {name: weight.detach() for name, weight in model.named_parameters()}
        polarizer = Polarizer(place.conv).to(place.conv.weight.device)
        radius = self.rms * ctx.benign.shape.numel() ** 0.5
        tuning = ctx.recipe.tuning(
            self.epochs, self.batch_size, self.lr, self.momentum, self.weight_decay
        )
        recipe = replace(tuning, schedule="constant", crop=0, flip=False)

        def purifying(polarizer: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            folded = {f"{place.name}.{name}": part for name, part in polarizer().items()}
            network = with_weights(model, {**frozen, **folded})
            logits = network(images)
            pushed = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
            still = with_weights(model, {**frozen, **{k: v.detach() for k, v in folded.items()}})
            answers = network(self.push(still, images, pushed, radius))
            return (
                F.cross_entropy(logits, labels)
                + self.avoid * unlikely(answers, pushed).mean()
                + self.robust * margin_loss(answers, labels)
            )

        fit(
            polarizer,
            ctx.benign,
            recipe,
            seed=ctx.derive("polarizer"),
            progress=ctx.progress,
            label="polarizer",
            loss=purifying,
            notes=ctx.notes,
            static=True,
        )
        with torch.no_grad():
            for name, part in polarizer().items():
                getattr(place.conv, name).copy_(part)
        ctx.notes["layer"] = place.name
        ctx.notes["relative_change"] = round(polarizer.distance(), 6)
        return model

    def push(self, network: Network, images: Tensor, labels: Tensor, radius: float) -> Tensor:
        """Images (N, C, H, W) at most ``radius`` away that look more like ``labels`` (N,)."""
        hard = images
        for number in range(self.steps):
            hard = hard.detach().requires_grad_()
            logits = network(hard)
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels), hard)
            with torch.no_grad():
                further = nearest(images, hard - self.step * slope.sign(), radius, "l2")
                done = (logits.argmax(1) == labels).float().mean() > self.enough
                hard = torch.where(done, hard, further) if number else further
        return hard.detach()


class Polarizer(nn.Module):
    """() -> the weights of ``conv`` followed by a square matrix, the identity at first, and a
    shift where there is a bias to take it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(conv.out_channels))
        self.shift = None if conv.bias is None else nn.Parameter(torch.zeros(conv.out_channels))
        self.before = {name: weight.detach().clone() for name, weight in conv.named_parameters()}

    def forward(self) -> dict[str, Tensor]:
        weight = self.before["weight"]
        folded = {"weight": (self.matrix @ weight.flatten(1)).view_as(weight)}
        if self.shift is not None:
            folded["bias"] = self.matrix @ self.before["bias"] + self.shift
        return folded

    def distance(self) -> float:
        """Of the matrix from the identity, relative to the identity's norm."""
        start = torch.eye(len(self.matrix)).to(self.matrix)
        return float((self.matrix.detach() - start).norm() / start.norm())


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Boosted cross-entropy, -log p(label) - log(1 - the largest other p), the mean; Wang et al.,
    "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020."""
    rival = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
    return F.cross_entropy(logits, labels) + unlikely(logits, rival).mean()
