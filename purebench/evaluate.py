"""Evaluate: the judge. ACC, ASR and RA from integer counts on the test split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attack import Goal, triggered
from .data import Split, batches, to_float

_BATCH = {"cpu": 500, "cuda": 5000}  # images a forward pass


@dataclass(frozen=True)
class Scores:
    """Integer counts; every metric derives from them.

    clean_correct / clean_count: test images classified correctly.
    triggered_as_target / triggered_as_true / triggered_count: of the triggered images whose true
        class is not the attacker's aim, those taken for the target and for their true class.
    most_predicted_count: clean images given to the class most often predicted.
    nonfinite_count: images, clean or triggered, whose logits are not all finite.
    """

    clean_correct: int
    clean_count: int
    triggered_as_target: int
    triggered_as_true: int
    triggered_count: int
    most_predicted_count: int
    nonfinite_count: int

    @property
    def acc(self) -> float:
        """Clean accuracy."""
        return self.clean_correct / self.clean_count

    @property
    def asr(self) -> float:
        """Attack success rate."""
        return self.triggered_as_target / self.triggered_count

    @property
    def ra(self) -> float:
        """Robust accuracy: triggered images classified as what they are."""
        return self.triggered_as_true / self.triggered_count

    @property
    def diverged(self) -> bool:
        """Some logits are NaN or infinite: the other counts then mean nothing."""
        return self.nonfinite_count > 0

    @property
    def degenerate(self) -> bool:
        """More than 95 % of clean images are given to one class."""
        return self.most_predicted_count > 0.95 * self.clean_count


def der(before: Scores, after: Scores) -> float:
    """Defense effectiveness rating, in [0, 1]; doing nothing scores 0.5.

    Zhu et al., FT-SAM, ICCV 2023, arXiv:2304.11823, equation 7.
    """
    gained = max(0.0, before.asr - after.asr)
    lost = max(0.0, before.acc - after.acc)
    return (gained - lost + 1) / 2


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
