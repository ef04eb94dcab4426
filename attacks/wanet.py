"""WaNet: warp a fraction of the training set by one smooth, small displacement field.

Anh Nguyen, Anh Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021,
arXiv:2102.10369. The noise mode is on: further images, warped by the same field with noise added
to it, keep their labels.

Ours departs in this: images are drawn and warped once, before training, as a data poisoning; the
authors control the training and draw both kinds anew in each batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import ATTACKS, AttackContext, PoisoningAttack


class WarpTrigger(nn.Module):
    """Images (N, C, H, W) in [0, 1], read at the points ``grid`` (H, W, 2): x, y in [-1, 1]."""

    grid: Tensor

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.register_buffer("grid", grid)

    def forward(self, images: Tensor) -> Tensor:
        return read(images, self.grid.expand(len(images), -1, -1, -1))


def read(images: Tensor, points: Tensor) -> Tensor:
    """Images (N, C, H, W) at ``points`` (N, H, W, 2), bilinear; the corners are at -1 and 1."""
    return F.grid_sample(images, points, mode="bilinear", align_corners=True)


def field(offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """Control offsets (2, k, k), whose mean size is made 1, enlarged to (H, W, 2)."""
    offsets = offsets / offsets.abs().mean()
    smooth = F.interpolate(offsets[None], size=size, mode="bicubic", align_corners=True)
    return smooth[0].permute(1, 2, 0)


def identity(size: tuple[int, int]) -> Tensor:
    """The points (H, W, 2) at which an image is read unchanged."""
    rows, columns = (torch.linspace(-1, 1, count) for count in size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=2)


def unit(size: tuple[int, int]) -> Tensor:
    """Displacements are given in these, for x and y: (2,); about half a pixel each."""
    return 1 / torch.tensor([size[1], size[0]])


@ATTACKS.register("wanet")
@dataclass(frozen=True)
class WaNet(PoisoningAttack):
    """k: control points a side, at least 2.
    s: strength, above 0: the control offsets' mean size, in units of about half a pixel.
    cover_ratio: noise images for each poisoned one, 0 or more.
    """

    paper: ClassVar[str] = "Nguyen and Tran 2021, arXiv:2102.10369"
    k: int = 4
    s: float = 0.5
    cover_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k must be at least 2, got {self.k}")
        if self.s <= 0:
            raise ValueError(f"s must be above 0, got {self.s}")
        if self.cover_ratio < 0:
            raise ValueError(f"cover_ratio must not be negative, got {self.cover_ratio}")

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        size = (shape[1], shape[2])
        offsets = field(torch.rand(2, self.k, self.k, generator=rng) * 2 - 1, size)
        return WarpTrigger((identity(size) + self.s * unit(size) * offsets).clamp(-1, 1))

    def cover_images(
        self, images: Tensor, trigger: nn.Module, ctx: AttackContext, rng: torch.Generator
    ) -> Tensor:
        assert isinstance(trigger, WarpTrigger)
        size = (images.shape[2], images.shape[3])
        noise = (torch.rand(len(images), *size, 2, generator=rng) * 2 - 1) * unit(size)
        return read(images, (trigger.grid + noise.to(trigger.grid.device)).clamp(-1, 1))
