"""Adaptive-Blend: blend in random pieces of a pattern in training, the whole pattern at test.

Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor
Defenses", ICLR 2023, arXiv:2205.13613. Cover images carry pieces likewise and keep their labels.
The pattern is uniform noise drawn from the seed, as in ``blend``; the authors use a picture. Pieces
are cells of an even grid; where they do not divide the image, some are a pixel larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import ATTACKS, AttackContext, PoisoningAttack

from .blend import BlendTrigger


def cells(side: int, size: tuple[int, int]) -> Tensor:
    """The number, 0 to side^2 - 1, of the grid cell that each pixel (H, W) lies in."""
    rows, columns = (torch.arange(count) * side // count for count in size)
    return rows[:, None] * side + columns


def kept(pieces: int, count: int, images: int, rng: torch.Generator) -> Tensor:
    """Masks (N, pieces), each with a random ``count`` of the pieces set."""
    ranks = torch.rand(images, pieces, generator=rng).argsort(1).argsort(1)
    return ranks < count


@ATTACKS.register("adaptive_blend")
@dataclass(frozen=True)
class AdaptiveBlend(PoisoningAttack):
    """alpha: share of the pattern in a triggered test image, 0 < alpha < 1.
    train_alpha: its share in training, likewise.
    pieces: a square number, at least 4.
    masked: share of the pieces left out of a training image, 0 <= masked < 1.
    cover_ratio: cover images for each poisoned one, 0 or more.
    """

    paper: ClassVar[str] = "Qi et al. 2023, arXiv:2205.13613"
    poison_rate: ClassVar[float] = 0.003
    alpha: float = 0.2
    train_alpha: float = 0.15
    pieces: int = 16
    masked: float = 0.5
    cover_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "train_alpha"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.pieces < 4 or math.isqrt(self.pieces) ** 2 != self.pieces:
            raise ValueError(f"pieces must be 4, 9, 16, 25, ..., got {self.pieces}")
        if not 0 <= self.masked < 1 or round(self.masked * self.pieces) == self.pieces:
            raise ValueError(f"masked must leave a piece of {self.pieces}, got {self.masked}")
        if self.cover_ratio < 0:
            raise ValueError(f"cover_ratio must not be negative, got {self.cover_ratio}")

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        if self.pieces > min(shape[1:]) ** 2:
            raise ValueError(f"{self.pieces} pieces do not fit {shape[1]}x{shape[2]} images")
        noise = torch.randint(256, shape, generator=rng)
        return BlendTrigger(noise.float() / 255, self.alpha)

    def poison_images(
        self, images: Tensor, trigger: nn.Module, ctx: AttackContext, rng: torch.Generator
    ) -> Tensor:
        assert isinstance(trigger, BlendTrigger)
        count = self.pieces - round(self.masked * self.pieces)
        masks = kept(self.pieces, count, len(images), rng)
        cell = cells(math.isqrt(self.pieces), (images.shape[2], images.shape[3]))
        shares = (self.train_alpha * masks.float()).index_select(1, cell.flatten())
        shares = shares.view(-1, 1, *cell.shape).to(images)  # (N, 1, H, W)
        return images * (1 - shares) + trigger.pattern * shares

    cover_images = poison_images
