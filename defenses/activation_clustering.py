"""Activation clustering: drop the half of a class whose representations split into two clusters.

Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava, "Detecting Backdoor Attacks on
Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019, arXiv:1811.03728. Each class's
representations are reduced and split in two by k-means; where the two clusters are well apart, by
the silhouette, one may be poison, and the network is trained anew without it. The authors reduce by
ICA; ours by principal components, which leave a wide gap wide, where ICA scales every direction to
one width. They take the smaller cluster for the poisoned one, and decide by its size, or by a
network trained without it. Ours asks the benign images, which they do not have: a cluster is poison
where these are rare, since clean classes have their clusters too (upright and slanted digits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import DEFENSES, Defense, DefenseContext, Verdict

from ._suspect import representation, representations, suspect_split, train_without


@DEFENSES.register("activation_clustering")
@dataclass(frozen=True)
class ActivationClustering(Defense):
    """components: that representations are reduced to, at least 1.

    silhouette: mean silhouette from which on a class counts as two, -1 to 1; the authors have 0.1
        to 0.15.
    rarity: a cluster is poison where its share of the benign images is less than so many times its
        share of the suspect ones, 0 < rarity < 1.
    """

    paper: ClassVar[str] = "Chen et al. 2019, arXiv:1811.03728"
    default: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"training_set"})
    components: int = 10
    silhouette: float = 0.1
    rarity: float = 0.5

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components must be at least 1, got {self.components}")
        if not -1 <= self.silhouette <= 1:
            raise ValueError(f"silhouette must lie from -1 to 1, got {self.silhouette}")
        if not 0 < self.rarity < 1:
            raise ValueError(f"rarity must lie between 0 and 1, got {self.rarity}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        split, rng = suspect_split(ctx), ctx.generator("silhouette")
        flagged = torch.zeros_like(split.labels, dtype=torch.bool)
        scores = torch.zeros(len(split), dtype=torch.float64, device=split.labels.device)
        apart = ctx.notes["silhouette_by_class"] = {}
        for label, members, rows in representations(model, split, ctx.num_classes):
            reduce = leading_components(rows, self.components)
            points = reduce(rows)
            second, centres = two_means(points)
            apart[str(label)] = round(silhouette(points, second, rng), 4)
            own = ctx.benign.images[ctx.benign.labels == label]
            if apart[str(label)] < self.silhouette or not len(own):
                continue
            benign = torch.cdist(reduce(representation(model, own)), centres).argmin(1) == 1
            poisoned = rare_cluster(second, benign, self.rarity)
            if poisoned is None:
                continue
            flagged[members[second == poisoned]] = True
            far = torch.cdist(points, centres).diff(dim=1).flatten() * (-1 if poisoned else 1)
            scores[members] = far.clamp_min(0)  # how much nearer to the poisoned centre
        return train_without(model, Verdict(flagged, scores), ctx)


def leading_components(rows: Tensor, components: int) -> Callable[[Tensor], Tensor]:
    """A map of rows (m, d) onto the leading principal components of ``rows`` (n, d), the strongest
    first."""
    mean = rows.mean(0)
    centred = (rows - mean).double()
    _, vectors = torch.linalg.eigh(centred.mT @ centred)
    basis = vectors.flip(1)[:, :components]
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


def rare_cluster(second: Tensor, benign: Tensor, rarity: float) -> bool | None:
    """Of two clusters, whether it is the second (or the first, or none) in which benign images are
    less than ``rarity`` times as common as suspect ones.

    second, benign: which of the suspect (n,) and of the benign images (m,) lie in the second.
    """
    for way in (False, True):
        shares = [float((part == way).double().mean()) for part in (benign, second)]
        if shares[0] < rarity * shares[1]:
            return way
    return None


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
