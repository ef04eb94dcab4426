"""Mode connectivity repair (MCR): walk the low-loss path from the suspect network to its fine-tuned
copy, and stop on the way.

Zhao, Chen, Das, Ramamurthy, Lin, "Bridging Mode Connectivity in Loss Landscapes and Adversarial
Robustness", ICLR 2020, arXiv:2005.00060; the path is a quadratic Bezier curve, after Garipov et
al., NeurIPS 2018, arXiv:1802.10026. The authors have two tampered networks for its ends. A
defender here has one, so that the other end is its fine-tuned copy, as in BackdoorBench
(arXiv:2206.12654); where the back door survives fine-tuning it survives at both ends. Where to
stop is fixed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, DefenseContext, Recipe, fit

from ._passes import renew_statistics, with_weights
from .fine_tune import FineTune


@DEFENSES.register("mcr")
@dataclass(frozen=True)
class MCR(FineTune):
    """stop: the point of the path that is returned, from 0, the suspect network, to 1.

    curve_epochs, curve_lr: of training the curve's middle point. The others, of the second end:
    see ``fine_tune``.
    """

    paper: ClassVar[str] = "Zhao et al. 2020, arXiv:2005.00060"
    default: ClassVar[bool] = False
    epochs: int = 30
    stop: float = 0.3
    curve_epochs: int = 30
    curve_lr: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.stop <= 1:
            raise ValueError(f"stop must lie from 0 to 1, got {self.stop}")
        Recipe(self.curve_epochs, lr=self.curve_lr)

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        tuned = self.tune(copy.deepcopy(model), ctx)
        first, last = weights_of(model), weights_of(tuned)
        path = bezier(first, last)
        rng = ctx.generator("place")

        def along(middle: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            place = float(torch.rand((), generator=rng))
            network = with_weights(middle, path(dict(middle.named_parameters()), place))
            return F.cross_entropy(network(images), labels)

        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_((first[name] + last[name]) / 2)
        recipe = ctx.recipe.tuning(
            self.curve_epochs, self.batch_size, self.curve_lr, self.momentum, self.weight_decay
        )
        fit(
            model,
            ctx.benign,
            recipe,
            seed=ctx.derive("curve"),
            progress=ctx.progress,
            label="curve",
            loss=along,
            notes=ctx.notes,
        )
        with torch.no_grad():
            for name, value in path(weights_of(model), self.stop).items():
                model.get_parameter(name).copy_(value)
        renew_statistics(model, ctx.benign.images, self.batch_size)
        return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight, by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def bezier(
    first: dict[str, Tensor], last: dict[str, Tensor]
) -> Callable[[dict[str, Tensor], float], dict[str, Tensor]]:
    """(middle, t) -> (1 - t)^2 first + 2 t (1 - t) middle + t^2 last, weight by weight."""

    def path(middle: dict[str, Tensor], place: float) -> dict[str, Tensor]:
        shares = (1 - place) ** 2, 2 * place * (1 - place), place**2
        return {
            name: shares[0] * first[name] + shares[1] * middle[name] + shares[2] * last[name]
            for name in middle
        }

    return path
