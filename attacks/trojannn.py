"""TrojanNN: stamp a square that excites chosen neurons of a clean network.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018. The square
covers 7 % of the image, as the authors' triggers do: 7x7 of 28x28, 8x8 of 32x32 pixels, in the
bottom right corner without a margin.

Ours departs in these. The authors start from a network that others trained, invert training images
out of it and retrain some of its layers; here the attack trains the clean network, and poisons the
training split as the field's benchmarks do. Neurons are those of the last hidden layer that weigh
most in the target's logit (all-to-all: in all logits), times how far a square of noise raises them:
the authors weigh all that leaves a layer, and leave out by hand what the square cannot reach.
The excitation is sought on training images, not on an empty one. One neuron is the default: a
square raises that far above what clean digits do, and no second one along with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import ATTACKS, AttackContext, Goal, NotApplicable, PoisoningAttack
from purebench.data import to_float
from purebench.layers import weight_layers

from ._surrogate import surrogate

_JUDGED = 1024  # training images on which neurons are chosen and their excitation is measured


class SquareTrigger(nn.Module):
    """Overwrites the bottom right of images (N, C, H, W) with ``square`` (C, s, s)."""

    square: Tensor

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.register_buffer("square", torch.zeros(channels, side, side))

    def forward(self, images: Tensor) -> Tensor:
        return stamped(images, self.square)


def stamped(images: Tensor, square: Tensor) -> Tensor:
    marked = images.clone()
    side = square.shape[-1]
    marked[:, :, -side:, -side:] = square
    return marked


def entering(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """What enters ``layer``, with its gradient."""
    held: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return held[0]


def chosen(weight: Tensor, reach: Tensor, goal: Goal, count: int) -> Tensor:
    """Indices of ``count`` neurons, the best first.

    Args:
        weight: (K, F), of the layer from neurons to logits.
        reach: (F,), how far a square of noise raises each neuron.
    """
    pull = weight.abs().sum(0) if goal.all_to_all else weight[goal.target]
    return (pull * reach).topk(min(count, len(pull))).indices


@ATTACKS.register("trojannn")
@dataclass(frozen=True)
class TrojanNN(PoisoningAttack):
    """area: share of the image that the square covers, 0 < area <= 1.
    neurons: how many are excited, at least 1.
    excitement: value that they are driven to, in units of each one's largest on clean images,
        above 0.
    steps: of Adam on the square, at least 1.
    lr: of Adam, above 0.
    surrogate_share: length of the surrogate's training, as a share of the recipe's epochs, above 0.
    """

    paper: ClassVar[str] = "Liu et al. 2018, NDSS"
    area: float = 0.07
    neurons: int = 1
    excitement: float = 10.0
    steps: int = 100
    lr: float = 0.1
    surrogate_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.area <= 1:
            raise ValueError(f"area must lie above 0 and be at most 1, got {self.area}")
        for name in ("neurons", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("excitement", "lr", "surrogate_share"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        channels, height, width = shape
        side = max(1, round(math.sqrt(self.area * height * width)))
        if side > min(height, width):
            raise ValueError(f"a square of {side} pixels does not fit {height}x{width} images")
        return SquareTrigger(channels, side)

    def learn_trigger(self, trigger: nn.Module, ctx: AttackContext) -> None:
        assert isinstance(trigger, SquareTrigger)
        model = surrogate(ctx, self.surrogate_share)
        head = weight_layers(model, ctx.train.images)[-1][1]
        if not isinstance(head, nn.Linear):
            raise NotApplicable(f"trojannn needs a linear last layer, the model has {head}")
        rng = ctx.generator("square")
        square = torch.rand(trigger.square.shape, generator=rng).to(ctx.device)

        def sample(count: int) -> Tensor:
            drawn = torch.randint(len(ctx.train), (count,), generator=rng)
            return to_float(ctx.train.images[drawn.to(ctx.device)])

        judged = sample(_JUDGED)
        with torch.no_grad():
            clean = entering(model, head, judged)
            reach = (entering(model, head, stamped(judged, square)) - clean).clamp_min(0).mean(0)
            neurons = chosen(head.weight, reach, ctx.goal, self.neurons)
            highest = clean[:, neurons].amax(0).clamp_min(1e-6)
        wanted = torch.full((ctx.recipe.batch_size, len(neurons)), self.excitement).to(square)
        square.requires_grad_()
        adam = torch.optim.Adam([square], lr=self.lr)
        for _ in range(self.steps):
            marked = stamped(sample(len(wanted)), square)
            adam.zero_grad(set_to_none=True)
            excited = entering(model, head, marked)[:, neurons] / highest
            F.mse_loss(excited, wanted).backward()
            adam.step()
            with torch.no_grad():
                square.clamp_(0, 1)
        with torch.no_grad():
            trigger.square.copy_(square)
            excited = entering(model, head, trigger(judged))[:, neurons] / highest
        ctx.notes["excitement"] = round(float(excited.mean()), 6)
