"""Spectral signatures: drop the training images that lie far along their class's main direction.

Brandon Tran, Jerry Li, Aleksander Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018,
arXiv:1811.00636. An image's score is the square of its centred representation along the leading
right singular vector of its class's; the highest in every class are dropped and the network is
trained anew. The authors drop 1.5 times the number of poisoned images, which they know; a defender
does not, so that a fixed share stands in for it. Where the poisoned are about half of the target
class, both halves score alike and the method cannot tell them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import DEFENSES, Defense, DefenseContext, Verdict

from ._suspect import representations, suspect_split, train_without


@DEFENSES.register("spectral")
@dataclass(frozen=True)
class Spectral(Defense):
    """share: of each class that is dropped, 0 < share < 1."""

    paper: ClassVar[str] = "Tran et al. 2018, arXiv:1811.00636"
    default: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"training_set"})
    share: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        split = suspect_split(ctx)
        flagged = torch.zeros_like(split.labels, dtype=torch.bool)
        scores = torch.zeros(len(split), dtype=torch.float64, device=split.labels.device)
        for _, members, rows in representations(model, split, ctx.num_classes):
            own = outlier_scores(rows)
            scores[members] = own / own.mean().clamp_min(1e-30)  # one scale for all classes
            count = round(self.share * len(members))
            flagged[members[own.argsort(descending=True, stable=True)[:count]]] = True
        return train_without(model, Verdict(flagged, scores), ctx)


def outlier_scores(rows: Tensor) -> Tensor:
    """(n,): squares of the centred ``rows`` (n, d) along their leading right singular vector."""
    centred = (rows - rows.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.mT @ centred)
    along: Tensor = centred @ vectors[:, -1]
    return along.square()
