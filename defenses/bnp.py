"""BatchNorm-statistics pruning (BNP): prune the channels that benign images reach otherwise than
BatchNorm remembers.

Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022 (no
arXiv version), its second method. BatchNorm's running statistics come from the poisoned training
set. A channel is pruned where the divergence

    KL(N(m, v) || N(M, V)) = log(sqrt(V / v)) + (v + (m - M)^2) / (2 V) - 1 / 2

of what benign images give it (mean m, variance v) from what is stored (M, V) is an outlier of its
layer. Ours takes m and v over all benign images, where the authors' code takes one batch, and
counts them in the network as given, before any channel is pruned. At the authors' u = 3 a layer of
ten channels or less cannot lose one. On MNIST it weakens badnets and hardly touches blend, see
``clp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import DEFENSES, Defense, DefenseContext, NotApplicable
from purebench.data import to_float

from ._channels import outliers
from ._masks import prune
from ._watch import watching


@DEFENSES.register("bnp")
@dataclass(frozen=True)
class BNP(Defense):
    """u: sample standard deviations above its layer's mean from which a divergence outlies,
    above 0."""

    paper: ClassVar[str] = "Zheng et al. 2022, NeurIPS"
    u: float = 3.0

    def __post_init__(self) -> None:
        if self.u <= 0:
            raise ValueError(f"u must be above 0, got {self.u}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        norms = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.BatchNorm2d) and layer.affine and layer.track_running_stats
        }
        if not norms:
            raise NotApplicable("the network has no BatchNorm, whose statistics are compared")
        met = moments(model, list(norms.values()), ctx.benign.images)
        found = {
            name: outliers(divergence(*met[norm], *stored(norm)), self.u)
            for name, norm in norms.items()
        }
        ctx.notes["pruned"] = prune(model, found)
        return model


def stored(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(C,) running mean and variance, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.double(), norm.running_var.double()


@torch.no_grad()
def moments(
    model: nn.Module, modules: list[nn.BatchNorm2d], images: Tensor
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """(C,) mean and variance, float64, of what enters each module, over images and positions."""
    sums: dict[nn.Module, Tensor] = {}
    with watching(modules) as seen:
        for part in images.split(250):
            model(to_float(part))
            for module, (entering, _) in seen.items():
                columns = entering.transpose(0, 1).flatten(1).double()
                ones = torch.ones_like(columns[:, 0]) * columns.shape[1]
                now = torch.stack([ones, columns.sum(1), columns.square().sum(1)])
                sums[module] = sums[module] + now if module in sums else now
    return {
        module: (total / count, (squares / count - (total / count) ** 2).clamp(min=0))
        for module, (count, total, squares) in sums.items()
    }


def divergence(mean: Tensor, variance: Tensor, stored_mean: Tensor, stored_var: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(stored_mean, stored_var)), elementwise, in nats. Variances have a
    floor of 1e-12: a channel that is constant twice, at one value, diverges by nothing."""
    variance, stored_var = variance.clamp(min=1e-12), stored_var.clamp(min=1e-12)
    shift = (mean - stored_mean).square()
    return (stored_var / variance).log() / 2 + (variance + shift) / (2 * stored_var) - 0.5
