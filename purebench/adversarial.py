"""Adversarial: images made hard for a network, within a ball around them, by gradient steps.

Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial
Attacks", ICLR 2018, arXiv:1706.06083.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["linf", "l2"]


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    norm: Norm = "linf",
    rng: torch.Generator | None = None,
) -> Tensor:
    """Images at most ``eps`` away from ``images`` that raise the cross-entropy.

    The network works in the mode that it is in; its weights receive no gradient.

    Args:
        labels: (N,); the true ones make the attack untargeted. The others: see ``ascend``.
    """

    def loss(hard: Tensor) -> Tensor:
        return F.cross_entropy(model(hard), labels, reduction="sum")

    return ascend(loss, images, eps=eps, step=step, steps=steps, norm=norm, rng=rng)


def ascend(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    norm: Norm = "linf",
    rng: torch.Generator | None = None,
) -> Tensor:
    """Images at most ``eps`` away from ``images`` that raise ``objective``.

    Args:
        objective: images -> a sum over them.
        images: (N, C, H, W) float in [0, 1]; so is the result, detached.
        eps, step: radius and length of a step, in the norm over an image's pixels in [0, 1].
        rng: on the images' device, draws the start from the ball; without it, ``images`` start.
    """
    hard = images.detach()
    if rng is not None:
        noise = torch.rand(images.shape, generator=rng, device=images.device) * 2 - 1
        hard = nearest(images, hard + eps * (noise if norm == "linf" else _unit(noise)), eps, norm)
    with torch.enable_grad():
        for _ in range(steps):
            hard.requires_grad_()
            (slope,) = torch.autograd.grad(objective(hard), hard)
            ascent = slope.sign() if norm == "linf" else _unit(slope)
            hard = nearest(images, hard.detach() + step * ascent, eps, norm)
    return hard.detach()


def nearest(images: Tensor, hard: Tensor, eps: float, norm: Norm) -> Tensor:
    """``hard`` drawn back into the ball around ``images``, and into [0, 1]."""
    change = hard - images
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        change = change * (eps / _length(change)).clamp(max=1)
    nearest: Tensor = (images + change).clamp(0, 1)  # clipping brings them nearer yet
    return nearest


def _unit(changes: Tensor) -> Tensor:
    return changes.div(_length(changes))


def _length(changes: Tensor) -> Tensor:
    """L2 norm of each image (N, 1, 1, 1), above 0."""
    length: Tensor = torch.linalg.vector_norm(changes, dim=(1, 2, 3), keepdim=True)
    return length.clamp_min(1e-12)
