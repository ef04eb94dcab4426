"""Feature shift tuning (FST): give the network a fresh head, kept away from the old one, so that
features must shift.

Min, Qin, Shen, Cheng, "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS
2023, arXiv:2310.01875. Ours runs for more epochs than the authors' 10: with 1 % benign data those
are too few steps for a head that starts anew. Its penalty is of the cosine between the two heads,
not of their inner product, which grows with their length: the authors' 0.1 of that is for a
ResNet-18, and makes small_cnn's head the old one's opposite, at the cost of its features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, DefenseContext
from purebench.model import reinitialise

from ._passes import head
from .fine_tune import FineTune


@DEFENSES.register("fst")
@dataclass(frozen=True)
class FST(FineTune):
    """alpha: weight of the cosine between the new and the old head's weights, 0 or more.

    The others: see ``fine_tune``.
    """

    paper: ClassVar[str] = "Min et al. 2023, arXiv:2310.01875"
    revision: ClassVar[int] = 2
    default: ClassVar[bool] = False
    epochs: int = 40
    batch_size: int = 128
    weight_decay: float = 0.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        last = head(model, ctx.benign.images)
        old = last.weight.detach().clone()
        reinitialise(last, ctx.derive("head"))

        def shifting(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            keep_length(last.weight, old)  # after the step before, and before the first
            likeness = (last.weight * old).sum() / old.square().sum()
            return F.cross_entropy(model(images), labels) + self.alpha * likeness

        self.tune(model, ctx, shifting)
        keep_length(last.weight, old)
        cosine = F.cosine_similarity(last.weight.detach().flatten(), old.flatten(), 0)
        ctx.notes["head_cosine"] = round(float(cosine), 6)
        return model


@torch.no_grad()
def keep_length(weight: Tensor, reference: Tensor) -> None:
    """Give ``weight`` the length of ``reference``, in place."""
    weight.mul_(reference.norm() / weight.norm().clamp_min(1e-12))
