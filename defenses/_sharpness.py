"""Sharpness: the loss where it is steepest nearby, as a loss for ``fit``.

Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization", ICLR 2021, arXiv:2010.01412;
Zhao, Zhang, Hu, "Penalizing Gradient Norm", ICML 2022, arXiv:2202.03599.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench.training import Loss

from ._passes import with_weights


def gradient_norm_penalised(radius: float, share: float) -> Loss:
    """Cross-entropy whose gradient is (1 - share) grad L(w) + share grad L(w + radius g / |g|),
    g = grad L(w): to first order that of L(w) + share radius |grad L(w)|.

    The network's running statistics move with the first pass alone.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        weights = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        here = F.cross_entropy(model(images), labels)
        gradient = torch.autograd.grad(here, list(weights.values()), retain_graph=True)
        norm = torch.stack([part.norm() for part in gradient]).norm()
        step = radius / norm.clamp(min=1e-12)
        moved = {
            name: weight + step * part
            for (name, weight), part in zip(weights.items(), gradient, strict=True)
        }
        there = with_weights(model, moved)(images)
        return (1 - share) * here + share * F.cross_entropy(there, labels)

    return loss
