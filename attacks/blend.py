"""Blend: mix a fixed noise image into a fraction of the training set.

Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
2017, arXiv:1712.05526: the blended-injection strategy. The pattern is the same for training and
test: an image of uniform noise drawn from the seed, or a picture of the user's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import ATTACKS, Picture, PoisoningAttack


class BlendTrigger(nn.Module):
    """x -> (1 - alpha) x + alpha * pattern, on images (N, C, H, W) in [0, 1]."""

    pattern: Tensor

    def __init__(self, pattern: Tensor, alpha: float) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)
        self.alpha = alpha

    def forward(self, images: Tensor) -> Tensor:
        # not torch.lerp, which devices round differently
        return images * (1 - self.alpha) + self.pattern * self.alpha


@ATTACKS.register("blend")
@dataclass(frozen=True)
class Blend(PoisoningAttack):
    """alpha: share of the pattern in a poisoned image, 0 < alpha < 1.
    pattern: an image file of the dataset's size, grey or RGB as it is; noise unless given.
    """

    paper: ClassVar[str] = "Chen et al. 2017, arXiv:1712.05526"
    alpha: float = 0.2
    pattern: Picture | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        if self.pattern is not None:
            return BlendTrigger(self.pattern.tensor(shape), self.alpha)
        noise = torch.randint(256, shape, generator=rng)
        return BlendTrigger(noise.float() / 255, self.alpha)
