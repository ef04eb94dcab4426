"""Stealth: how far triggered images lie from clean ones, in the measures that attacks report.

SSIM is that of Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to
Structural Similarity", IEEE Transactions on Image Processing 13(4), 2004: a Gaussian window of
11 x 11 and sigma 1.5, K1 .01, K2 .03, where it lies inside the image whole; a mean over
places and channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import to_float
from .scores import CEILING, STEALTH_METRICS

_SIDE, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_CHUNK = 250


def stealth(clean: Tensor, marked: Tensor) -> dict[str, float]:
    """Means over image pairs, uint8 (N, C, H, W), N >= 1, as fractions of [0, 1].

    psnr in dB, ``CEILING`` at most; ssim, -1 to 1; linf, the largest change of a value; l2, the
    length of all changes of an image.
    """
    sums = torch.zeros(len(STEALTH_METRICS), dtype=torch.float64, device=clean.device)
    for first, second in zip(clean.split(_CHUNK), marked.split(_CHUNK), strict=True):
        first, second = to_float(first), to_float(second)
        change = (second - first).flatten(1).double()
        parts = psnr(change), ssim(first, second), change.abs().amax(1), change.norm(dim=1)
        sums += torch.stack([part.double().sum() for part in parts])
    means = (sums / len(clean)).tolist()
    return {name: round(value, 6) for name, value in zip(STEALTH_METRICS, means, strict=True)}


def psnr(change: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of changes (N, D) of values in [0, 1]."""
    return (-10 * change.square().mean(1).log10()).clamp(max=CEILING)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity (N,) of images (N, C, H, W) float in [0, 1].

    The window shrinks to images smaller than it.
    """
    _, _, height, width = first.shape
    count = len(first)
    first, second = first.double(), second.double()  # variances are small differences
    planes = torch.stack([first, second, first * first, second * second, first * second])
    planes = planes.flatten(0, 2)[:, None]
    for window in (_window(height)[:, None], _window(width)[None]):
        planes = F.conv2d(planes, window[None, None].to(planes))
    x, y, xx, yy, xy = planes.view(5, count, -1)
    spread = xx - x * x + yy - y * y
    luminance = (2 * x * y + _C1) / (x * x + y * y + _C1)
    structure = (2 * (xy - x * y) + _C2) / (spread + _C2)
    alike: Tensor = luminance * structure
    return alike.mean(1)


def _window(size: int) -> Tensor:
    side = min(_SIDE, size)
    places = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    weights = torch.exp(-places.square() / (2 * _SIGMA**2))
    return weights / weights.sum()
