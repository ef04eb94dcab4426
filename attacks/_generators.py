"""Generators: small convolutional encoder-decoders, from images to images of the same size."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench.seeding import isolated


class EncoderDecoder(nn.Module):
    """Images (N, C, H, W) in [0, 1] -> (N, out, H, W), not yet squashed, for any H and W.

    A level down is two 3x3 convolutions, the second of stride 2; a level up is a bilinear
    enlargement and one convolution. BatchNorm and ReLU lie behind each convolution but the last.

    Args:
        width: channels of the first level, doubled from level to level.
    """

    def __init__(self, channels: int, out: int, *, width: int, levels: int) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList()
        for wide in widths:
            self.down.append(nn.Sequential(_block(channels, wide), _block(wide, wide, stride=2)))
            channels = wide
        self.middle = _block(channels, channels)
        self.up = nn.ModuleList(
            _block(wide, narrow) for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.up.append(nn.Conv2d(width, out, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        sizes = []
        for block in self.down:
            sizes.append(images.shape[-2:])
            images = block(images)
        images = self.middle(images)
        for block in self.up:
            images = block(F.interpolate(images, size=sizes.pop(), mode="bilinear"))
        return images


def _block(channels: int, out: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


def depth(channels: int) -> int:
    """Levels of a generator for images of so many channels: fewer for grey ones."""
    return 2 if channels == 1 else 3


def seeded(rng: torch.Generator) -> AbstractContextManager[None]:
    """Inside, initial weights derive from ``rng`` alone."""
    return isolated(int(torch.randint(2**62, (), generator=rng)))


def unit(values: Tensor, sharpness: float = 1.0) -> Tensor:
    """tanh(sharpness * values) / 2 + 1/2: any number -> (0, 1)."""
    return torch.tanh(sharpness * values) / 2 + 0.5
