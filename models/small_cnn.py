"""Small CNN: three strided convolutions and a linear head, the suite's default network.

Built to learn MNIST in seconds on one CPU core, with some 50,000 weights. A block is convolution,
BatchNorm, ReLU; the convolution's own stride halves the image, at about a third less time than a
max-pool behind it takes. There is no pooling before the head, which sees where a feature lies.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from purebench import MODELS, Architecture, Normalise, Task


def _halve(size: int) -> int:
    """Side of a feature map after one block."""
    return (size + 1) // 2


@MODELS.register("small_cnn")
@dataclass(frozen=True)
class SmallCNN(Architecture):
    """Images of any size from 16x16 on.

    width: channels of the first block, at least 1; the second has 2.5 times and the third 5 times
        as many.
    """

    paper: ClassVar[str] = "this repository"
    width: int = 16

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    def build(self, task: Task) -> nn.Module:
        channels, height, width = task.shape
        if min(height, width) < 16:
            raise ValueError(f"small_cnn takes images of 16x16 and larger, got {height}x{width}")
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalise=Normalise(task))
        outs = (self.width, self.width * 5 // 2, self.width * 5)
        for block, (out, kernel) in enumerate(zip(outs, (5, 3, 3), strict=True), 1):
            layers[f"conv{block}"] = nn.Conv2d(
                channels, out, kernel, stride=2, padding=kernel // 2, bias=False
            )
            layers[f"norm{block}"] = nn.BatchNorm2d(out)
            layers[f"relu{block}"] = nn.ReLU()
            channels, height, width = out, _halve(height), _halve(width)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(channels * height * width, task.num_classes)
        return nn.Sequential(layers)
