"""Decoupling-based defense (DBD): learn what images look like without their labels, and only then
which labels to believe.

Huang, Li, Wu, Qin, Ren, "Backdoor Defense via Decoupling the Training Process", ICLR 2022,
arXiv:2202.03423. Features are learned by contrast (SimCLR), where a poisoned image lies with those
that look like it; a head is trained on them, and images whose label it does not come to believe
lose it. Ours is a simple relative. The head sees what the projector gives, that is what two views
of an image have in common: the authors' network pools its features, and where one does not, a
trigger is still plain in them. In the place of MixMatch, the network is trained on the believed
images, and once more with those that it then gives their labels. Views differ by zoom, place,
contrast and brightness, and are mirrored where the recipe mirrors. The authors learn features for
1,000 epochs; the default is two, which a laptop has time for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, Defense, DefenseContext, NotApplicable, Split, Verdict, fit
from purebench.evaluate import evaluating
from purebench.layers import weight_layers
from purebench.model import reinitialise
from purebench.seeding import isolated

from ._suspect import image_losses, suspect_split

LEAST = 1e-4  # what stands for the zeros of a label in the symmetric cross-entropy


@DEFENSES.register("dbd")
@dataclass(frozen=True)
class DBD(Defense):
    """epochs, batch_size, lr: of learning by contrast; at least 1, and above 0.

    temperature: of the contrast, above 0.
    head_epochs, head_lr: of the head, by Adam.
    believed: share of the images that keep their labels, 0 < believed <= 1.
    """

    paper: ClassVar[str] = "Huang et al. 2022, arXiv:2202.03423"
    default: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"training_set"})
    epochs: int = 2
    batch_size: int = 256
    lr: float = 0.1
    temperature: float = 0.5
    head_epochs: int = 5
    head_lr: float = 2e-3
    believed: float = 0.5

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "head_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "temperature", "head_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.believed <= 1:
            raise ValueError(f"believed must be above 0 and at most 1, got {self.believed}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        split = suspect_split(ctx)
        name, head = weight_layers(model, split.images)[-1]
        if not isinstance(head, nn.Linear):
            raise NotApplicable("the network has no linear last layer to part from its features")
        reinitialise(model, ctx.derive("fresh weights"))
        with isolated(ctx.derive("projector")):
            widths = head.in_features, 128, 64
            projector = nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(), nn.Linear(*widths[1:]))
            judge = nn.Sequential(projector, nn.Linear(widths[-1], ctx.num_classes))
        judge.to(ctx.device)
        model.set_submodule(name, projector)
        self.learn_features(model, split, ctx)
        model.set_submodule(name, judge)
        losses = self.judge_labels(model, judge[1], split, ctx)
        model.set_submodule(name, head)

        believed = torch.zeros_like(split.labels, dtype=torch.bool)
        believed[losses.argsort(stable=True)[: max(1, round(self.believed * len(split)))]] = True
        self.train(model, split, believed, ctx, "believed")
        self.train(model, split, believed | agreeing(model, split), ctx, "believed and agreeing")
        ctx.verdict = Verdict(~believed, losses)
        return model

    def learn_features(self, model: nn.Module, split: Split, ctx: DefenseContext) -> None:
        """By contrast, in place; labels are not looked at."""
        rng = ctx.generator("views")

        def loss(model: nn.Module, images: Tensor, _: Tensor) -> Tensor:
            both = torch.cat([view(images, ctx.recipe.flip, rng) for _ in range(2)])
            return contrast(model(both), self.temperature)

        recipe = replace(ctx.recipe, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr)
        seed = ctx.derive("contrast")
        fit(model, split, recipe, seed=seed, progress=ctx.progress, label="contrast", loss=loss)

    def judge_labels(
        self, model: nn.Module, last: nn.Module, split: Split, ctx: DefenseContext
    ) -> Tensor:
        """The loss of each label (N,), once the ``last`` layer alone has been trained on them."""
        model.requires_grad_(False)
        last.requires_grad_(True)
        recipe = replace(ctx.recipe, epochs=self.head_epochs, lr=self.head_lr, schedule="constant")
        fit(
            model,
            split,
            replace(recipe, warmup=0.0),
            seed=ctx.derive("head"),
            progress=ctx.progress,
            label="head",
            loss=judging,
            descent=partial(torch.optim.Adam, lr=self.head_lr),
        )
        model.requires_grad_(True)
        return image_losses(model, split, symmetric_cross_entropy)

    def train(
        self, model: nn.Module, split: Split, kept: Tensor, ctx: DefenseContext, label: str
    ) -> None:
        """In place, on the images of the mask."""
        ctx.notes.setdefault("images", {})[label] = int(kept.sum())
        part, seed = split[torch.nonzero(kept).flatten()], ctx.derive(label)
        fit(model, part, ctx.recipe, seed=seed, progress=ctx.progress, label=label, static=True)


def agreeing(model: nn.Module, split: Split) -> Tensor:
    """Mask (N,) of the images that the network gives their labels."""
    return image_losses(model, split, lambda logits, labels: logits.argmax(1) == labels)


def judging(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The head's loss; by the running statistics of BatchNorm, as the features are to stay."""
    with evaluating(model):
        return symmetric_cross_entropy(model(images), labels).mean()


def contrast(rows: Tensor, temperature: float) -> Tensor:
    """NT-Xent of SimCLR (Chen et al. 2020, arXiv:2002.05709, equation 1), a scalar: rows (2n, d),
    of which i and i + n are two views of one image."""
    rows = F.normalize(rows.float(), dim=1)
    nearness = (rows @ rows.mT / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(rows), device=rows.device).roll(len(rows) // 2)
    return F.cross_entropy(nearness, partner)


def symmetric_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,): 0.1 CE + RCE (Wang et al. 2019, arXiv:1908.06112), which a wrong label pulls less."""
    chances = logits.softmax(1).gather(1, labels[:, None]).flatten()
    reverse = (1 - chances) * -torch.tensor(LEAST).log().item()
    return 0.1 * F.cross_entropy(logits, labels, reduction="none") + reverse


def view(images: Tensor, flip: bool, rng: torch.Generator) -> Tensor:
    """One look at each image (N, C, H, W) in [0, 1]: zoomed to 60 % and more of its side, moved as
    far as it then reaches, with other contrast and brightness; mirrored by chance with ``flip``."""
    count = len(images)
    side = 0.6 + 0.4 * torch.rand(count, generator=rng)
    shift = (1 - side)[:, None] * (2 * torch.rand(count, 2, generator=rng) - 1)
    mirror = torch.where(torch.rand(count, generator=rng) < 0.5 * flip, -1.0, 1.0)
    zeros = torch.zeros(count)
    rows = [torch.stack([side * mirror, zeros, shift[:, 0]], 1)]
    rows.append(torch.stack([zeros, side, shift[:, 1]], 1))
    change = torch.rand(2, count, 1, 1, 1, generator=rng)
    theta, change = torch.stack(rows, 1).to(images.device), change.to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (seen * (0.6 + 0.8 * change[0]) + 0.4 * (change[1] - 0.5)).clamp(0, 1)
