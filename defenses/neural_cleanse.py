"""Neural Cleanse: look for a class that a small patch leads to, and unlearn that patch.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", IEEE S&P 2019. For each class, the smallest mask and the pattern under
it that lead every benign image there; a class whose mask is an outlier among the classes' masks, by
the median absolute deviation and on the small side, is flagged. Ours searches all classes at once,
each with its own weight of the mask's size, and unlearns by the running statistics of BatchNorm,
which it keeps. Where no class is flagged, the network is returned unchanged, and the record says
so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import DEFENSES, DefenseContext, NotApplicable, fit
from purebench.evaluate import evaluating
from purebench.seeding import generator

from ._passes import with_weights
from .fine_tune import FineTune


@DEFENSES.register("neural_cleanse")
@dataclass(frozen=True)
class NeuralCleanse(FineTune):
    """steps: of the search, at least 1. images: benign images a step, each tried on every class.
    search_lr: of Adam. weight: of a mask's size, at first, above 0.
    factor: that weight grows by it while a class succeeds and falls by its power 1.5 while not,
        after ``patience`` steps of one kind; above 1, and at least 1.
    success: share of a step's images that must be led to the class, in 0 to 1.
    index: from this anomaly index on, a class is flagged, above 0.
    stamped: share of the images that carry a flagged class's patch in unlearning, above 0 to 1.
    The others, of unlearning: see ``fine_tune``.
    """

    paper: ClassVar[str] = "Wang et al. 2019, IEEE S&P"
    default: ClassVar[bool] = False
    epochs: int = 10
    steps: int = 400
    images: int = 32
    search_lr: float = 0.1
    weight: float = 1e-3
    factor: float = 1.5
    patience: int = 5
    success: float = 0.98
    index: float = 2.0
    stamped: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "images", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("search_lr", "weight", "index"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.factor <= 1:
            raise ValueError(f"factor must be above 1, got {self.factor}")
        for name in ("success", "stamped"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        if ctx.num_classes < 3:
            raise NotApplicable(f"{ctx.num_classes} classes have no outlier")
        search = self.search(model, ctx)
        sizes = search.best_size
        anomaly = anomaly_index(sizes)
        flagged = torch.nonzero(anomaly > self.index).flatten().tolist()
        ctx.notes["mask_sizes"] = [round(float(size), 4) for size in sizes]
        ctx.notes["anomaly_index"] = [round(float(value), 4) for value in anomaly]
        ctx.notes["flagged"] = flagged
        if not flagged:
            ctx.notes["warning"] = "no class was flagged: the network is returned unchanged"
            return model
        rng = generator(ctx.seed, "stamped", device=ctx.benign.images.device)

        def unlearning(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            draw = torch.randint(len(flagged), (len(images),), generator=rng, device=images.device)
            which = torch.tensor(flagged, device=images.device)[draw]
            with evaluating(model):
                usual = F.cross_entropy(model(images), labels)
                marked = F.cross_entropy(model(search.stamp(images, which)), labels)
            return torch.lerp(usual, marked, self.stamped)

        return self.tune(model, ctx, unlearning, static=False)  # draws from a generator of its own

    def search(self, model: nn.Module, ctx: DefenseContext) -> Search:
        """The smallest patches that were found, on the frozen network."""
        search = Search(ctx.num_classes, ctx.benign.shape, self, ctx.generator("patches"))
        search.to(ctx.benign.images.device)
        frozen = {name: weight.detach() for name, weight in model.named_parameters()}
        network = with_weights(model, frozen)
        per_epoch = -(-len(ctx.benign) // self.images)
        recipe = replace(
            ctx.recipe,
            epochs=-(-self.steps // per_epoch),
            batch_size=self.images,
            lr=self.search_lr,
            schedule="constant",
            warmup=0.0,
            crop=0,
            flip=False,
        )
        fit(
            search,
            ctx.benign,
            recipe,
            seed=ctx.derive("search"),
            progress=ctx.progress,
            label="searching patches",
            loss=lambda _, images, __: search.loss(network, images),
            descent=partial(torch.optim.Adam, betas=(0.5, 0.9)),
        )
        return search


class Search(nn.Module):
    """A mask and a pattern a class, on their way to the smallest that work.

    best_size (K,), best_mask (K, 1, H, W), best_pattern (K, C, H, W): of the smallest patches that
    led ``patience`` steps' images to their class; the whole image where none did.
    """

    streak: Tensor
    weight: Tensor
    best_size: Tensor
    best_mask: Tensor
    best_pattern: Tensor

    def __init__(
        self, classes: int, shape: torch.Size, settings: NeuralCleanse, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.settings = settings
        height, width = shape[1:]
        self.raw_mask = nn.Parameter(torch.rand(classes, 1, height, width, generator=rng) - 0.5)
        self.raw_pattern = nn.Parameter(torch.rand(classes, *shape, generator=rng) - 0.5)
        self.register_buffer("streak", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("weight", torch.full((classes,), settings.weight))
        self.register_buffer("best_size", torch.full((classes,), float(height * width)))
        self.register_buffer("best_mask", torch.ones(classes, 1, height, width))
        self.register_buffer("best_pattern", torch.full((classes, *shape), 0.5))

    def loss(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Of all classes, on every image with every class's patch."""
        mask, pattern = (raw.tanh() / 2 + 0.5 for raw in (self.raw_mask, self.raw_pattern))
        marked = torch.lerp(images[None], pattern[:, None], mask[:, None])
        classes, count = marked.shape[:2]
        aims = torch.arange(classes, device=images.device).repeat_interleave(count)
        logits = network(marked.flatten(0, 1))
        errors = F.cross_entropy(logits, aims, reduction="none").view(classes, count).mean(1)
        led = (logits.argmax(1) == aims).view(classes, count).float().mean(1)
        sizes = mask.sum((1, 2, 3))
        loss = (errors + self.weight * sizes).sum()
        self.judge(led, sizes.detach(), mask.detach(), pattern.detach())
        return loss

    def judge(self, led: Tensor, sizes: Tensor, mask: Tensor, pattern: Tensor) -> None:
        """Keep what is smaller and sure to work; press for smaller masks, or ease off."""
        works = led >= self.settings.success
        self.streak = torch.where(works, self.streak.clamp_min(0) + 1, self.streak.clamp_max(0) - 1)
        sure, failed = (self.streak == way * self.settings.patience for way in (1, -1))
        better = sure & (sizes < self.best_size)
        self.best_size = torch.where(better, sizes, self.best_size)
        chosen = better[:, None, None, None]
        self.best_mask = torch.where(chosen, mask, self.best_mask)
        self.best_pattern = torch.where(chosen, pattern, self.best_pattern)
        factor = self.settings.factor
        self.weight = self.weight * torch.where(sure, factor, 1.0)
        self.weight = self.weight * torch.where(failed, factor**-1.5, 1.0)
        self.streak = torch.where(sure | failed, 0, self.streak)

    def stamp(self, images: Tensor, which: Tensor) -> Tensor:
        """Images (N, C, H, W), each with the best patch of class ``which`` (N,)."""
        return torch.lerp(images, self.best_pattern[which], self.best_mask[which])


def anomaly_index(sizes: Tensor) -> Tensor:
    """(K,): how far each size lies below the median, in median absolute deviations, made
    comparable to standard deviations; 0 at and above it."""
    below = sizes.quantile(0.5) - sizes
    spread = 1.4826 * below.abs().quantile(0.5)
    return (below / spread.clamp_min(1e-12)).clamp_min(0)
