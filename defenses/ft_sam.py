"""Fine-tuning with sharpness-aware minimisation (FT-SAM): fine-tune by the slope at the worst
weights nearby, which moves the back door's neurons.

Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
Minimization", ICCV 2023, arXiv:2304.11823; adaptive sharpness after Kwon, Kim, Park, Choi, "ASAM",
ICML 2021, arXiv:2102.11600, without its constant beside the weights. BatchNorm's running statistics
follow the first of a step's two passes alone, which is at the network's own weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, DefenseContext

from ._passes import with_weights
from .fine_tune import FineTune


@DEFENSES.register("ft_sam")
@dataclass(frozen=True)
class FTSAM(FineTune):
    """rho: how far the worst weights lie, relative to each weight's own size, 0 or more.

    label_smoothing: 0 <= label_smoothing < 1. The others: see ``fine_tune``.
    """

    paper: ClassVar[str] = "Zhu et al. 2023, arXiv:2304.11823"
    revision: ClassVar[int] = 2
    default: ClassVar[bool] = False
    rho: float = 2.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 0:
            raise ValueError(f"rho must not be negative, got {self.rho}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}"
            )

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        return self.tune(model, ctx, self.worst_loss)

    def worst_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The loss at the worst weights nearby; its slope there is the slope it hands back."""
        weights = dict(model.named_parameters())
        loss = F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)
        slopes = torch.autograd.grad(loss, list(weights.values()))
        logits = with_weights(model, worst(weights, slopes, self.rho))(images)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def worst(weights: Mapping[str, Tensor], slopes: Sequence[Tensor], rho: float) -> dict[str, Tensor]:
    """Weights w + e where a loss with slopes g is largest, to first order, among all e with
    |e / w| <= rho: e = rho w^2 g / |w g|, the norms over all weights. A change of w moves w + e
    alike.
    """
    sizes = [weight.detach().abs() for weight in weights.values()]
    scaled = [size * slope for size, slope in zip(sizes, slopes, strict=True)]
    length = torch.stack([part.square().sum() for part in scaled]).sum().sqrt().clamp_min(1e-12)
    changes = [rho * size * part / length for size, part in zip(sizes, scaled, strict=True)]
    return {name: weight + e for (name, weight), e in zip(weights.items(), changes, strict=True)}
