"""Evaluate: the judge. ACC, ASR and RA from integer counts on the test split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .attack import Goal, triggered
from .data import Split, batches, to_float
from .scores import Scores

_BATCH = {"cpu": 500, "cuda": 5000}  # images a forward pass


class Judge:
    """Holds the test split and, made once, its triggered images: those at ``eligible``.

    Args:
        test: on the device of the models to be judged.
    """

    def __init__(self, test: Split, trigger: nn.Module, goal: Goal) -> None:
        self.test = test
        self.goal = goal
        self.eligible = torch.nonzero(goal.eligible(test.labels)).flatten()
        part = test[self.eligible]
        self.triggered = Split(triggered(trigger, part.images), part.labels)

    def score(self, model: nn.Module) -> Scores:
        """The counts of one network, judged in evaluation mode."""
        model.eval()
        clean, clean_bad = predictions(model, self.test.images)
        marked, marked_bad = predictions(model, self.triggered.images)
        true = self.triggered.labels
        counts = (
            (clean == self.test.labels).sum(),
            (marked == self.goal.labels(true)).sum(),
            (marked == true).sum(),
            torch.bincount(clean, minlength=1).max(),
            clean_bad + marked_bad,
        )
        correct, as_target, as_true, most, bad = torch.stack(counts).tolist()
        return Scores(correct, len(clean), as_target, as_true, len(true), most, bad)


@torch.inference_mode()
def predictions(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted classes (N,) of uint8 images, and how many images have logits not finite."""
    classes, bad = [], torch.zeros((), dtype=torch.int64, device=images.device)
    for part in batches(images, _BATCH.get(images.device.type, 500)):
        logits = model(to_float(part.contiguous(memory_format=torch.channels_last)))
        classes.append(logits.argmax(1))
        bad += (~logits.isfinite().all(1)).sum()
    return torch.cat(classes), bad


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of ``split`` classified correctly; for a defense that looks at benign data.

    The network's training mode is left as it was.
    """
    return int(correct(model, split).sum()) / len(split)


def correct(model: nn.Module, split: Split) -> Tensor:
    """Which images of ``split`` are classified correctly, (N,) bool; see ``accuracy``."""
    with evaluating(model):
        classes, _ = predictions(model, split.images)
    return classes == split.labels


def accuracy_lost(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Of the same images, each ``correct`` or not: how much accuracy goes, and its standard error,
    for which an image counts 1, 0, or -1 if it is won."""
    lost = before.float() - after.float()
    return float(lost.mean()), float(lost.std()) / len(lost) ** 0.5


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside, networks are in evaluation mode: BatchNorm works by its running statistics, as it
    will when they are used, and keeps them. Afterwards each module's mode is as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
