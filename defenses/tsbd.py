"""Two-stage backdoor defense (TSBD): reset the weights that clean unlearning changes most, then
fine-tune on flat ground.

Lin, Liu, Wei, Li, Xiong, "Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning
Weight Changes and Backdoor Activeness", NeurIPS 2024, arXiv:2405.20291. Stage 1: a copy unlearns
the benign images by gradient ascent; the channels of all convolutions are ranked by how far their
weights went, summed; in the first n, the share m of weights that went farthest become zero. Stage
2: fine-tuning with a penalty on the gradient's norm.

The authors choose n by test ASR. Here it is the largest of the shares from which benign images can
bring the network back: after stage 2 on a part of them, accuracy on the others is within the budget
of what it was. As much is reset as can be afforded, whatever the attack. The learning rate of
ascent is ten times theirs, with which MNIST takes over 1,000 steps to unlearn.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from purebench import DEFENSES, Defense, DefenseContext, Split, fit
from purebench.evaluate import accuracy

from ._channels import convolutions
from ._sharpness import gradient_norm_penalised
from ._unlearn import unlearn

Changes = dict[str, Tensor]


@DEFENSES.register("tsbd")
@dataclass(frozen=True)
class TSBD(Defense):
    """unlearn_lr, unlearn_steps: of gradient ascent, which ends at chance at the latest.

    shares: candidates of n, rising, above 0 to 1. m: share of their weights, 0 < m <= 1.
    budget: benign accuracy that may be lost, 0 to 1.
    holdout: share of the benign images that it is measured on, between 0 and 1.
    epochs, batch_size, lr: of stage 2. radius: of its step up, above 0. penalty: 0 to 1.
    """

    paper: ClassVar[str] = "Lin et al. 2024, arXiv:2405.20291"
    revision: ClassVar[int] = 2
    default: ClassVar[bool] = False
    unlearn_lr: float = 1e-3
    unlearn_steps: int = 250
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    m: float = 0.7
    budget: float = 0.02
    holdout: float = 0.2
    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.01
    radius: float = 0.05
    penalty: float = 0.7

    def __post_init__(self) -> None:
        for name in ("unlearn_steps", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("unlearn_lr", "lr", "radius"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("budget", "penalty"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must lie between 0 and 1, got {self.holdout}")
        if not 0 < self.m <= 1:
            raise ValueError(f"m must be above 0 and at most 1, got {self.m}")
        rising = sorted(self.shares)
        if not rising or list(self.shares) != rising or not 0 < rising[0] <= rising[-1] <= 1:
            raise ValueError(f"shares must rise from above 0 to at most 1, got {self.shares}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        split, validation = ctx.holdout(self.holdout)
        changes = self.unlearning_changes(model, split, validation, ctx)
        share = self.affordable_share(model, changes, split, validation, ctx)
        ctx.notes.update(share=share, share_from="benign accuracy")
        ctx.notes["reset"] = reset(model, changes, share, self.m)
        return self._tune(model, ctx.benign, ctx)

    def unlearning_changes(
        self, model: nn.Module, split: Split, validation: Split, ctx: DefenseContext
    ) -> Changes:
        """How far each weight (channel, entry) of each convolution goes in clean unlearning."""
        unlearnt = copy.deepcopy(model)
        recipe = replace(
            ctx.recipe, batch_size=self.batch_size, lr=self.unlearn_lr, momentum=0.9, weight_decay=0
        )
        facts = unlearn(
            unlearnt, split, validation, recipe, floor=1 / ctx.num_classes, clip=float("inf"),
            steps=self.unlearn_steps, seed=ctx.derive("unlearning"), progress=ctx.progress,
        )  # fmt: skip
        ctx.notes.update(facts)
        after = dict(unlearnt.named_parameters())
        return {
            name: (after[f"{name}.weight"] - conv.weight).detach().abs().flatten(1)
            for name, conv in convolutions(model, split.images)
        }

    def affordable_share(
        self,
        model: nn.Module,
        changes: Changes,
        split: Split,
        validation: Split,
        ctx: DefenseContext,
    ) -> float:
        """The rule for n; the smallest of the shares where none can be afforded."""
        floor = accuracy(model, validation) - self.budget
        tried = ctx.notes.setdefault("benign_accuracy_by_share", {})
        for share in self.shares[:0:-1]:
            candidate = copy.deepcopy(model)
            reset(candidate, changes, share, self.m)
            left = accuracy(self._tune(candidate, split, ctx), validation)
            tried[f"{share:g}"] = round(left, 6)
            if left >= floor - 1e-9:  # counts over counts: ties are meant
                return share
        return self.shares[0]

    def _tune(self, model: nn.Module, split: Split, ctx: DefenseContext) -> nn.Module:
        recipe = ctx.recipe.tuning(self.epochs, self.batch_size, self.lr)
        return fit(
            model, split, recipe, seed=ctx.derive("tuning"), progress=ctx.progress,
            label="fine-tuning", loss=gradient_norm_penalised(self.radius, self.penalty),
            notes=ctx.notes, static=True,
        )  # fmt: skip


@torch.no_grad()
def reset(model: nn.Module, changes: Changes, share: float, m: float) -> dict[str, list[int]]:
    """In the ``share`` of channels with the largest summed changes, zero the ``m`` of the weights
    that changed most. Both rankings run over all layers. Returns the channels by layer."""
    chosen = top([change.sum(1) for change in changes.values()], share)
    inside = [
        change.masked_fill(~rows[:, None], -1)
        for change, rows in zip(changes.values(), chosen, strict=True)
    ]
    layers = dict(model.named_modules())
    total = sum(change.numel() for change in inside)
    affected = sum(int((change >= 0).sum()) for change in inside)
    for name, entries in zip(changes, top(inside, m * affected / total), strict=True):
        weight = layers[name].weight
        weight[entries.view_as(weight)] = 0
    return {
        name: torch.nonzero(rows).flatten().tolist()
        for name, rows in zip(changes, chosen, strict=True)
    }


def top(parts: list[Tensor], share: float) -> list[Tensor]:
    """Masks of the largest ``share`` of all entries of ``parts``, at least one; ties in order."""
    flat = torch.cat([part.flatten() for part in parts])
    count = max(round(share * len(flat)), 1)
    least = flat.kthvalue(len(flat) - count + 1).values  # a network's weights are many to sort
    mask = flat > least
    ties = torch.nonzero(flat == least).flatten()
    mask[ties[: count - int(mask.sum())]] = True
    sizes = [part.numel() for part in parts]
    return [piece.view(part.shape) for piece, part in zip(mask.split(sizes), parts, strict=True)]
