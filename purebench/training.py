"""Training: the one loop. The split lies on the device as uint8; batches are made whole.

Every epoch's order and augmentation derive from (seed, epoch), so an epoch can be repeated alone.
Nothing waits for the device within an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Split, to_float
from .errors import Diverged
from .progress import Progress
from .savepoint import Part, Savepoints, resumed
from .seeding import generator

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Descent = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Recipe:
    """How to train, as data.

    epochs, batch_size: at least 1. Batches of one epoch differ by at most one image in size.
    lr, momentum, weight_decay, nesterov: of SGD.
    schedule: "cosine" falls to zero over all steps, "linear" likewise, "constant" stays.
    warmup: share of the steps over which lr rises linearly from zero, 0 <= warmup < 1.
    crop: padding of a random crop, in pixels; 0 leaves the image.
    flip: mirror half the images.
    precision: "fp32"; on CUDA also "tf32" or "bf16" (autocast).
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.0
    crop: int = 0
    flip: bool = False
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "crop"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be at least 0 and below 1, got {self.warmup}")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step 0 <= step < steps."""
        rise = self.warmup * steps
        if step + 1 <= rise:
            return self.lr * (step + 1) / rise
        if self.schedule == "constant":
            return self.lr
        done = max(step - rise, 0.0) / (steps - rise)  # rise may end within a step
        return self.lr * (
            1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        )

    def tuning(
        self,
        epochs: int,
        batch_size: int,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup: float = 0.0,
    ) -> Recipe:
        """For going on with a trained network: a cosine, and no Nesterov momentum, whatever this
        recipe has; augmentation and precision are its own."""
        return replace(
            self,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=False,
            schedule="cosine",
            warmup=warmup,
        )


RECIPES: dict[str, Recipe] = {
    # 60,000 digits on one CPU core in about 12 seconds
    "mnist_fast": Recipe(
        epochs=2, batch_size=128, lr=0.05, nesterov=True, schedule="linear", warmup=0.2
    ),
    # CIFAR-10 on a laptop: a small network in minutes
    "cifar_fast": Recipe(
        epochs=12, batch_size=128, lr=0.1, nesterov=True, warmup=0.2, crop=4, flip=True
    ),
    # BackdoorBench's, for numbers that can be laid beside the published ones
    "bb100": Recipe(epochs=100, batch_size=128, lr=0.01, crop=4, flip=True),
}


def fit(
    model: nn.Module,
    split: Split,
    recipe: Recipe,
    *,
    seed: int,
    progress: Progress,
    label: str = "training",
    loss: Loss | None = None,
    descent: Descent | None = None,
    notes: MutableMapping[str, Any] | None = None,
    savepoints: Savepoints | None = None,
    kept: Sequence[Part] = (),
) -> nn.Module:
    """Train ``model`` in place on ``split``, which lies on the model's device; returns it in
    evaluation mode.

    Args:
        loss: (model, images float32 in [0, 1], labels) -> scalar; cross-entropy unless given.
        descent: trained weights -> optimiser, whose learning rate is then set by the recipe; its
            SGD unless given.
        notes: receives ``loss_by_epoch``.
        savepoints: where a state is saved after each epoch, and one is taken up that lies there.
        kept: belongs to that state, too: what ``loss`` changes besides the model.

    Raises:
        Diverged: an epoch's mean loss is not finite.
    """
    loss = loss or cross_entropy
    device = split.images.device
    model.to(memory_format=torch.channels_last).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = (descent or sgd(recipe))(trained)
    steps_per_epoch = math.ceil(len(split) / recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    losses: list[float] = []
    keep = resumed(savepoints, model, optimiser, losses, *kept)
    with progress.bar(label, recipe.epochs, "epoch") as bar, precision(recipe, device) as autocast:
        if losses:
            bar.step(len(losses), loss=losses[-1])
        for epoch in range(len(losses), recipe.epochs):
            total = torch.zeros((), device=device)
            for index, (images, labels) in enumerate(batches(split, recipe, seed, epoch)):
                for group in optimiser.param_groups:
                    group["lr"] = recipe.lr_at(epoch * steps_per_epoch + index, steps)
                optimiser.zero_grad(set_to_none=True)
                with autocast():
                    value = loss(model, images, labels)
                value.backward()
                optimiser.step()
                total += value.detach()
            losses.append(float(total) / steps_per_epoch)
            if not math.isfinite(losses[-1]):
                raise Diverged(f"{label}: the loss of epoch {epoch + 1} is {losses[-1]}")
            keep()
            bar.step(loss=losses[-1])
    if notes is not None:
        notes["loss_by_epoch"] = [round(value, 6) for value in losses]
    return model.eval()


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The usual loss, as ``fit`` takes it."""
    return F.cross_entropy(model(images), labels)


def sgd(recipe: Recipe) -> Descent:
    """The recipe's optimiser."""
    return partial(
        torch.optim.SGD,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        fused=True,
    )


def batches(split: Split, recipe: Recipe, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images float32 in [0, 1] channels_last, labels), shuffled and augmented."""
    device = split.images.device
    rng = generator(seed, "epoch", epoch, device=device)
    order = torch.randperm(len(split), generator=rng, device=device)
    for part in order.tensor_split(math.ceil(len(split) / recipe.batch_size)):
        images = augment(split.images[part], recipe, rng)
        yield to_float(images.contiguous(memory_format=torch.channels_last)), split.labels[part]


def augment(images: Tensor, recipe: Recipe, rng: torch.Generator) -> Tensor:
    """Random padded crops and mirrored images, each its own, of uint8 images (N, C, H, W)."""
    count, _, height, width = images.shape
    device = images.device
    if recipe.crop:
        padded = F.pad(images, [recipe.crop] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2p+1, 2p+1, H, W)
        corner = torch.randint(2 * recipe.crop + 1, (2, count), generator=rng, device=device)
        images = windows[torch.arange(count, device=device), :, corner[0], corner[1]]
    if recipe.flip:
        mirrored = torch.rand(count, 1, 1, 1, generator=rng, device=device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    return images


@contextmanager
def precision(recipe: Recipe, device: torch.device) -> Iterator[Callable[[], Any]]:
    """Inside, the recipe's precision holds; the value enters autocast around a forward pass."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if recipe.precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = recipe.precision != "fp32"
    try:
        yield lambda: torch.autocast(
            device.type, torch.bfloat16, enabled=recipe.precision == "bf16"
        )
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
