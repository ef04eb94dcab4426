"""BadNets: stamp a small white square on a fraction of the training set.

Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain", 2017, arXiv:1708.06733. The square lies in the bottom right corner without a margin, as in
the field's benchmarks, for 28x28 and 32x32 images alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import ATTACKS, PoisoningAttack


class PatchTrigger(nn.Module):
    """Overwrites the bottom right ``size`` x ``size`` pixels of images (N, C, H, W) with 1."""

    mask: Tensor

    def __init__(self, shape: torch.Size, size: int) -> None:
        super().__init__()
        mask = torch.zeros(shape)
        mask[:, -size:, -size:] = 1
        self.register_buffer("mask", mask)

    def forward(self, images: Tensor) -> Tensor:
        return torch.maximum(images, self.mask)


@ATTACKS.register("badnets")
@dataclass(frozen=True)
class BadNets(PoisoningAttack):
    """size: side of the square in pixels, at least 1 and at most the image's."""

    paper: ClassVar[str] = "Gu et al. 2017, arXiv:1708.06733"
    size: int = 3

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        if self.size > min(shape[1:]):
            raise ValueError(f"size {self.size} does not fit {shape[1]}x{shape[2]} images")
        return PatchTrigger(shape, self.size)
