"""Activation clustering: drop the half of a class whose representations split into two clusters.

Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava, "Detecting Backdoor Attacks on
Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019, arXiv:1811.03728. Each class's
representations are reduced and split in two by k-means; a class in which the two clusters are well
apart, by the silhouette, holds poison, and the network is trained anew without it. The authors
reduce by ICA, which is a rotation of whitened principal components; k-means does not see rotations,
so ours stops at those. They take the smaller cluster for the poisoned one. Ours asks the benign
images, which they do not have: the poisoned cluster is the one that attracts fewer of their class,
relative to its size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import DEFENSES, Defense, DefenseContext

from ._suspect import representation, representations, suspect_split, train_without


@DEFENSES.register("activation_clustering")
@dataclass(frozen=True)
class ActivationClustering(Defense):
    """components: that representations are reduced to, at least 1.

    silhouette: mean silhouette from which on a class counts as two, -1 to 1; the authors have 0.1
        to 0.15.
    """

    paper: ClassVar[str] = "Chen et al. 2019, arXiv:1811.03728"
    default: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"training_set"})
    components: int = 10
    silhouette: float = 0.15

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components must be at least 1, got {self.components}")
        if not -1 <= self.silhouette <= 1:
            raise ValueError(f"silhouette must lie from -1 to 1, got {self.silhouette}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        split, rng = suspect_split(ctx), ctx.generator("silhouette")
        flagged = torch.zeros_like(split.labels, dtype=torch.bool)
        apart = ctx.notes["silhouette_by_class"] = {}
        for label, members, rows in representations(model, split, ctx.num_classes):
            reduce = whitening(rows, self.components)
            points = reduce(rows)
            second, centres = two_means(points)
            apart[str(label)] = round(silhouette(points, second, rng), 4)
            own = ctx.benign.images[ctx.benign.labels == label]
            if apart[str(label)] < self.silhouette or not len(own):
                continue
            benign = torch.cdist(reduce(representation(model, own)), centres).argmin(1)
            poisoned = float(benign.double().mean()) < float(second.double().mean())
            flagged[members[second == poisoned]] = True
        return train_without(model, flagged, ctx)


def whitening(rows: Tensor, components: int) -> Callable[[Tensor], Tensor]:
    """A map of rows (m, d) onto the leading principal components of ``rows`` (n, d), scaled to a
    variance of one, the strongest first; directions without variance are left out."""
    mean = rows.mean(0)
    centred = (rows - mean).double()
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(rows))
    chosen = values.flip(0)[:components]
    chosen = chosen[chosen > 1e-9 * chosen[0].clamp_min(1e-30)]
    basis = vectors.flip(1)[:, : len(chosen)] / chosen.sqrt()
    return lambda others: (others - mean).double() @ basis


def two_means(points: Tensor, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """Which points (n, k) belong to the second of two clusters (n,), and the centres (2, k). The
    start is the sign of the first coordinate, so that there is no chance in it."""
    second = points[:, 0] > 0
    for _ in range(rounds):
        if not 0 < int(second.sum()) < len(points):
            break
        centres = torch.stack([points[~second].mean(0), points[second].mean(0)])
        before, second = second, torch.cdist(points, centres).argmin(1) == 1
        if torch.equal(before, second):
            return second, centres
    return second, torch.stack([points[second == way].mean(0) for way in (False, True)])


def silhouette(points: Tensor, second: Tensor, rng: torch.Generator, most: int = 2000) -> float:
    """Mean over ``points`` (n, k), or ``most`` of them drawn at random, of (b - a) / max(a, b),
    with a and b the mean distances from the own and the other cluster; 0 without two clusters."""
    if len(points) > most:
        drawn = torch.randperm(len(points), generator=rng)[:most].to(points.device)
        points, second = points[drawn], second[drawn]
    sizes = torch.stack([(~second).sum(), second.sum()]).to(points)
    if sizes.min() < 2:
        return 0.0
    distances = torch.cdist(points, points)
    sums = torch.stack([distances[:, ~second].sum(1), distances[:, second].sum(1)])
    own, other = second.long()[None], (~second).long()[None]
    a = sums.gather(0, own)[0] / (sizes[own[0]] - 1)
    b = sums.gather(0, other)[0] / sizes[other[0]]
    return float(((b - a) / torch.maximum(a, b).clamp_min(1e-30)).mean())
