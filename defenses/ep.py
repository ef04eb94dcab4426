"""Entropy-based pruning (EP): prune the channels whose pre-activations fall into two heaps on the
suspect training set.

Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022 (no
arXiv version), its first method. A channel is seen through its largest pre-activation in an
image, standardised over the training set, poisoned images among it. Of distributions of one
variance the normal one has the largest entropy; a backdoor channel, a mixture, has less. Pruned is
the channel whose entropy, of a histogram of bins 0.01 wide, is an outlier of its layer's.

It needs the training set, mixed as it was trained on: on benign images alone there is no second
heap. A channel that is constant has no entropy and is left out. At the authors' u = 3 a layer of
ten channels or less cannot lose one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import DEFENSES, Defense, DefenseContext, NotApplicable
from purebench.data import to_float

from ._channels import outliers
from ._masks import Site, prune, sites
from ._watch import watching


@DEFENSES.register("ep")
@dataclass(frozen=True)
class EP(Defense):
    """u: sample standard deviations below its layer's mean from which an entropy outlies, above 0.

    width: of the histogram's bins, in standard deviations, above 0.
    """

    paper: ClassVar[str] = "Zheng et al. 2022, NeurIPS"
    needs: ClassVar[frozenset[str]] = frozenset({"training_set"})
    default: ClassVar[bool] = False
    u: float = 3.0
    width: float = 0.01

    def __post_init__(self) -> None:
        for name in ("u", "width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        if ctx.suspect is None:
            raise NotApplicable("the suspect training set is not given")
        where = sites(model)
        peaks = peak_activations(model, where, ctx.suspect.images)
        found = {}
        for name, values in peaks.items():
            entropies = torch.stack([entropy(channel, self.width) for channel in values.T])
            moving = torch.nonzero(entropies.isfinite()).flatten()
            found[name] = moving[outliers(-entropies[moving], self.u)]
        ctx.notes["pruned"] = prune(model, found)
        return model


@torch.no_grad()
def peak_activations(model: nn.Module, where: dict[str, Site], images: Tensor) -> dict[str, Tensor]:
    """(N, C) largest pre-activation of each channel in each image: of what enters a BatchNorm, or
    of what a convolution gives."""
    peaks: dict[str, list[Tensor]] = {name: [] for name in where}
    with watching(where.values()) as seen:
        for part in images.split(250):
            model(to_float(part))
            for name, site in where.items():
                entering, leaving = seen[site]
                values = entering if isinstance(site, nn.BatchNorm2d) else leaving
                peaks[name].append(values.amax((2, 3)))
    return {name: torch.cat(parts) for name, parts in peaks.items()}


def entropy(values: Tensor, width: float) -> Tensor:
    """Entropy in nats of a histogram of ``values`` (N,), standardised; NaN where they are all
    the same."""
    standard = (values - values.mean()) / values.std()
    if not standard.isfinite().all():
        return values.new_tensor(torch.nan)
    bins = ((standard - standard.min()) / width).long()
    _, counts = bins.unique(return_counts=True)
    shares = counts / len(values)
    total: Tensor = -(shares * shares.log()).sum()
    return total
