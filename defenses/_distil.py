"""Distil: train a network towards another one's soft answers on benign images.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench.training import Loss


def distilling(teacher: nn.Module, temperature: float, share: float) -> Loss:
    """A loss for ``fit``: ``share`` of cross-entropy, the rest the divergence from ``teacher``'s
    answers at ``temperature``, times its square, so that gradients keep their size.

    ``teacher`` is put into evaluation mode.
    """
    teacher.eval()

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(teacher(images) / temperature, 1)
        logits = model(images)
        given = F.log_softmax(logits / temperature, 1)
        distance = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        hard = F.cross_entropy(logits, labels)
        return share * hard + (1 - share) * temperature**2 * distance

    return loss
