"""Attention: where in an image a network's stages are active, and how far two networks differ.

Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench.data import to_float

from ._watch import watching


def stages(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the modules that give the last feature map of each spatial size, in the order data
    passes. A map of one position is left out: normalised, it is 1 whatever the network does."""
    names = {module: name for name, module in model.named_modules()}
    with watching(names) as seen, torch.no_grad():
        model(to_float(images[:2]))
    found: list[tuple[torch.Size, str]] = []
    for module, (_, output) in seen.items():
        if not found and not list(module.parameters()):
            continue  # still the image
        if output.ndim != 4 or output[0, 0].numel() == 1:
            continue
        if found and found[-1][0] == output.shape[2:]:
            found.pop()
        found.append((output.shape[2:], names[module]))
    return [name for _, name in found]


def attention_map(features: Tensor, power: float) -> Tensor:
    """(N, positions), of length 1: the sum over channels of |features (N, C, H, W)|^power."""
    return F.normalize(features.abs().pow(power).sum(1).flatten(1))


def attention_distance(given: Tensor, wanted: Tensor, power: float) -> Tensor:
    """Square distance of two features' attention maps, the mean over images. It does not depend on
    how many positions a map has, as a mean over these would."""
    maps = attention_map(given, power), attention_map(wanted, power)
    return F.mse_loss(*maps, reduction="sum") / len(given)
