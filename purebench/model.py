"""Model: the contract of an architecture. Images in [0, 1] go in, logits come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .data import Split
from .seeding import isolated


@dataclass(frozen=True)
class Task:
    """What a network is built for.

    shape: of one image, (C, H, W).
    num_classes: number of logits.
    mean, std: per channel, of the training images in [0, 1].
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, train: Split, num_classes: int) -> Task:
        """The task that a training split poses, its statistics exact from integer counts."""
        means, stds = [], []
        values = torch.arange(256, dtype=torch.float64) / 255
        for channel in range(train.shape[0]):
            counts = torch.bincount(train.images[:, channel].flatten().cpu(), minlength=256)
            weights = counts.double() / counts.sum()
            mean = float(weights @ values)
            means.append(mean)
            stds.append(max(float(weights @ (values - mean) ** 2) ** 0.5, 1e-3))
        channels, height, width = train.shape
        return cls((channels, height, width), num_classes, tuple(means), tuple(stds))


class Normalise(nn.Module):
    """x -> (x - mean) / std, per channel; the first layer of every model."""

    mean: Tensor
    std: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(task.mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(task.std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


@dataclass(frozen=True)
class Architecture(ABC):
    """A model plug-in: its fields are its settings, ``build`` makes the network.

    ``build`` draws initial weights from torch's global generator, which the caller seeds.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @abstractmethod
    def build(self, task: Task) -> nn.Module:
        """Images (N, C, H, W) float32 in [0, 1] -> logits (N, num_classes); its first layer is
        ``Normalise(task)``. In training it does the same for every batch: no branch on values,
        and no chance but torch's; on CUDA, steps are replayed. ValueError where the image shape
        does not fit, saying what would."""


def reinitialise(model: nn.Module, seed: int) -> nn.Module:
    """Give every layer fresh weights, in place: the same network, before any training."""
    with isolated(seed):
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
