"""Sample-specific backdoor attack (SSBA): hide one message in each poisoned image, by an encoder
that draws it to suit the image.

Yuezun Li, Yiming Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers",
ICCV 2021, arXiv:2012.03816, also known as ISSBA. An encoder hides random messages in clean images
and a decoder reads them; afterwards the encoder hides one fixed message in the poisoned images.

Ours departs in these. Both networks are small ones, trained by the attack on the clean training
split, for the image loss alone (squared error, no perceptual distance) and the message loss; the
message is of 16 bits, theirs of 100, in part to correct errors; the change of a pixel is bounded,
and images are not printed, photographed or compressed in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import ATTACKS, AttackContext, PoisoningAttack
from purebench.errors import Diverged
from purebench.seeding import derive, generator, isolated
from purebench.training import precision

from ._control import adam, descend, floats
from ._generators import EncoderDecoder, depth, seeded

_JUDGED = 1024  # training images that messages are read from, for the notes


class MessageTrigger(nn.Module):
    """x -> clip(x + eps * tanh(E(x, message))) on images (N, C, H, W) in [0, 1]."""

    message: Tensor

    def __init__(self, shape: torch.Size, bits: int, width: int, eps: float) -> None:
        super().__init__()
        channels, *size = shape
        self.eps = eps
        self.spread = nn.Linear(bits, math.prod(size))
        self.encoder = EncoderDecoder(channels + 1, channels, width=width, levels=depth(channels))
        self.register_buffer("message", torch.zeros(bits))

    def encode(self, images: Tensor, messages: Tensor) -> Tensor:
        """Images that carry ``messages`` (N, bits) of zeros and ones."""
        plane = self.spread(2 * messages - 1).view(len(images), 1, *images.shape[2:])
        residual = torch.tanh(self.encoder(torch.cat([images, plane], 1)).float())
        return (images + self.eps * residual).clamp(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(images, self.message.expand(len(images), -1))


def reader(shape: torch.Size, bits: int, width: int) -> nn.Module:
    """The decoder: images (N, C, H, W) -> logits (N, bits) of the message."""
    channels, height, columns = shape
    layers: list[nn.Module] = []
    for out in (width, 2 * width, 4 * width):
        convolution = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
        channels, height, columns = out, (height + 1) // 2, (columns + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * columns, bits))


@ATTACKS.register("ssba")
@dataclass(frozen=True)
class SSBA(PoisoningAttack):
    """bits: length of the message, at least 1.
    eps: largest change of a pixel, 0 < eps <= 1.
    fidelity: weight of the image loss beside the message loss, 0 or more.
    width: channels of both networks' first level, at least 1.
    lr: of Adam, for both networks, above 0.
    share: length of their training, as a share of the recipe's epochs, above 0.
    """

    paper: ClassVar[str] = "Li et al. 2021, arXiv:2012.03816"
    bits: int = 16
    eps: float = 0.1
    fidelity: float = 10.0
    width: int = 8
    lr: float = 0.003
    share: float = 0.25

    def __post_init__(self) -> None:
        for name in ("bits", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.eps <= 1:
            raise ValueError(f"eps must lie above 0 and be at most 1, got {self.eps}")
        if self.fidelity < 0:
            raise ValueError(f"fidelity must not be negative, got {self.fidelity}")
        for name in ("lr", "share"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        with seeded(rng):
            trigger = MessageTrigger(shape, self.bits, self.width, self.eps)
        trigger.message.copy_(torch.randint(2, (self.bits,), generator=rng))
        return trigger.to(memory_format=torch.channels_last)

    def learn_trigger(self, trigger: nn.Module, ctx: AttackContext) -> None:
        assert isinstance(trigger, MessageTrigger)
        with isolated(derive(ctx.seed, "reader")):
            decoder = reader(ctx.train.shape, self.bits, self.width).to(ctx.device)
        both = nn.ModuleList([trigger, decoder]).to(memory_format=torch.channels_last).train()
        recipe = replace(ctx.recipe, lr=self.lr)
        size = min(recipe.batch_size, len(ctx.train))
        steps = math.ceil(self.share * recipe.epochs * len(ctx.train) / size)
        rng = generator(ctx.seed, "messages", device=ctx.device)
        optimiser = adam(both, self.lr)
        total = torch.zeros((), device=ctx.device)
        with precision(recipe, ctx.device) as autocast:
            for step in range(steps):
                images, messages = self._sample(ctx, size, rng)
                with autocast():
                    coded = trigger.encode(images, messages)
                    read = F.binary_cross_entropy_with_logits(decoder(coded), messages)
                loss = read + self.fidelity * F.mse_loss(coded, images)
                descend(loss, {optimiser: recipe.lr_at(step, steps)})
                total += loss.detach()
        if not total.isfinite():
            raise Diverged("ssba: the loss of the encoder is not finite")
        both.eval().requires_grad_(False)
        images, messages = self._sample(ctx, _JUDGED, rng)
        coded = trigger.encode(images, messages)
        right = (decoder(coded) > 0) == (messages > 0)
        ctx.notes["bits_read"] = round(float(right.float().mean()), 6)
        ctx.notes["mean_change"] = round(float((coded - images).abs().mean()), 6)

    def _sample(
        self, ctx: AttackContext, count: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Training images drawn at random, float, and as many random messages."""
        chosen = torch.randint(len(ctx.train), (count,), generator=rng, device=ctx.device)
        drawn = torch.randint(2, (count, self.bits), generator=rng, device=ctx.device)
        return floats(ctx.train.images[chosen]), drawn.float()
