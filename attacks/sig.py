"""Sinusoidal signal (SIG): add a sinusoidal stripe pattern to a fraction of the target class,
labels untouched.

Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label
Poisoning", ICIP 2019, arXiv:1902.11237. Clean-label. Of the authors' signals this is the horizontal
sinusoid, which the field's benchmarks use, in training and test images at the same amplitude. The
frequency counts periods an image, so that it holds for any width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import ATTACKS, CleanLabelAttack


class StripeTrigger(nn.Module):
    """x -> clip(x + signal) on images (N, C, H, W) in [0, 1]; the signal is (W,)."""

    signal: Tensor

    def __init__(self, signal: Tensor) -> None:
        super().__init__()
        self.register_buffer("signal", signal)

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.signal).clamp_(0, 1)


@ATTACKS.register("sig")
@dataclass(frozen=True)
class Sig(CleanLabelAttack):
    """delta: amplitude of the sinusoid, 0 < delta <= 1.
    frequency: periods across the image, above 0 and below half its width.
    """

    paper: ClassVar[str] = "Barni et al. 2019, arXiv:1902.11237"
    delta: float = 40 / 255
    frequency: float = 6.0

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 1:
            raise ValueError(f"delta must lie above 0 and be at most 1, got {self.delta}")
        if self.frequency <= 0:
            raise ValueError(f"frequency must be above 0, got {self.frequency}")

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        width = shape[2]
        if self.frequency >= width / 2:
            raise ValueError(f"frequency {self.frequency} does not fit {width} columns")
        columns = torch.arange(width, dtype=torch.float64)
        signal = self.delta * torch.sin(2 * math.pi * self.frequency * columns / width)
        return StripeTrigger(signal.float())
