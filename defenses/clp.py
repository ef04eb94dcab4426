"""Channel Lipschitz pruning (CLP): silence the channels with an outlying Lipschitz bound, without
any data.

Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022,
arXiv:2208.03111. Ours departs in three points. The norm behind a convolution is found by following
the data, not by the order in which layers are declared (two benign images trace the way; no value
of theirs is used), and its variance counts with its epsilon, as in the norm itself. A convolution
with no norm of its own is bounded by its weight alone: all those of a network without BatchNorm,
and in a pre-activation block the second one and the shortcut, which are added to others first.

At the authors' u = 3 a layer of ten channels or less cannot lose one (lenet's first has six). In
small_cnn on MNIST it finds the two channels of the last convolution that badnets leans on most, and
blend stays: its trigger is spread over channels of which none stands out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import DEFENSES, Defense, DefenseContext

from ._channels import Channels, every_channels, outliers


@DEFENSES.register("clp")
@dataclass(frozen=True)
class CLP(Defense):
    """u: sample standard deviations above its layer's mean from which a bound outlies, above 0."""

    paper: ClassVar[str] = "Zheng et al. 2022, arXiv:2208.03111"
    u: float = 3.0

    def __post_init__(self) -> None:
        if self.u <= 0:
            raise ValueError(f"u must be above 0, got {self.u}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        pruned = ctx.notes.setdefault("pruned", {})
        largest = ctx.notes.setdefault("largest_deviation", {})
        for channels in every_channels(model, ctx.benign.images):
            bounds = lipschitz_bounds(channels)
            found = outliers(bounds, self.u)
            channels.silence(found)
            pruned[channels.name] = found.tolist()
            spread = bounds.std() if len(bounds) > 1 else bounds.new_zeros(())
            if spread > 0:
                deviation = (bounds.max() - bounds.mean()) / spread
                largest[channels.name] = round(float(deviation), 3)
        return model


@torch.no_grad()
def lipschitz_bounds(channels: Channels) -> Tensor:
    """(C,) largest singular value of each channel's weight as a matrix (inputs, kernel
    positions), times |gamma / sigma| of the norm behind it."""
    bounds: Tensor = torch.linalg.matrix_norm(channels.conv.weight.flatten(2), ord=2)
    norm = channels.norm
    if norm is not None and norm.running_var is not None:
        bounds = bounds / (norm.running_var + norm.eps).sqrt()
        if norm.affine:
            bounds = bounds * norm.weight.abs()
    return bounds
