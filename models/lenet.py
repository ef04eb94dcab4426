"""LeNet: two convolutions and three linear layers, with ReLU and max-pooling.

LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition",
Proceedings of the IEEE 86(11), 1998: LeNet-5. Ours has ReLU for tanh, max-pooling for the trained
subsampling, full connections in the second convolution and a plain linear head, as has become
usual; there is no BatchNorm. Images below 32x32 are padded by 2 pixels, as the digits were there.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from purebench import MODELS, Architecture, Normalise, Task


@MODELS.register("lenet")
@dataclass(frozen=True)
class LeNet(Architecture):
    """Images of any size from 16x16 on; no settings."""

    paper: ClassVar[str] = "LeCun et al. 1998, doi:10.1109/5.726791"

    def build(self, task: Task) -> nn.Module:
        channels, height, width = task.shape
        if min(height, width) < 16:
            raise ValueError(f"lenet takes images of 16x16 and larger, got {height}x{width}")
        padding = 2 if min(height, width) < 32 else 0

        def side(size: int) -> int:
            return ((size + 2 * padding - 4) // 2 - 4) // 2  # two 5x5 convolutions, each halved

        return nn.Sequential(
            OrderedDict(
                normalise=Normalise(task),
                conv1=nn.Conv2d(channels, 6, 5, padding=padding),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                linear1=nn.Linear(16 * side(height) * side(width), 120),
                relu3=nn.ReLU(),
                linear2=nn.Linear(120, 84),
                relu4=nn.ReLU(),
                head=nn.Linear(84, task.num_classes),
            )
        )
