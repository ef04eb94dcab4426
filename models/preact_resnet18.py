"""PreAct-ResNet-18: residual blocks that normalise and rectify before each convolution.

He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv:1603.05027, in
the form that the backdoor literature trains on 32x32 images (BackdoorBench and others): a 3x3 stem
with neither BatchNorm nor pooling; stages of 64, 128, 256 and 512 channels, two blocks each; where
the shape changes, a 1x1 convolution of the rectified input as shortcut; torch's default initial
weights. As in that form, and unlike the paper, no BatchNorm and ReLU stand between the last block
and the average pool.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from purebench import MODELS, Architecture, Normalise, Task


class PreActBlock(nn.Module):
    """x -> shortcut + conv2(relu(norm2(conv1(a)))) with a = relu(norm1(x)).

    The shortcut is x itself, or a 1x1 convolution of a where the block changes the shape.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            if stride != 1 or inputs != outputs
            else None
        )
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        active = self.relu1(self.norm1(features))
        shortcut: Tensor = features if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.conv2(self.relu2(self.norm2(self.conv1(active))))
        return shortcut + residual


@MODELS.register("preact_resnet18")
@dataclass(frozen=True)
class PreActResNet18(Architecture):
    """Images of any size from 16x16 on.

    width: channels of the stem and of the first stage, at least 1; each later stage has twice as
        many. 8 makes a network that a laptop trains in minutes, of the same depth and shortcuts.
    """

    paper: ClassVar[str] = "He et al. 2016, arXiv:1603.05027"
    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    def build(self, task: Task) -> nn.Module:
        channels, height, width = task.shape
        if min(height, width) < 16:
            raise ValueError(
                f"preact_resnet18 takes images of 16x16 and larger, got {height}x{width}"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            normalise=Normalise(task),
            stem=nn.Conv2d(channels, self.width, 3, padding=1, bias=False),
        )
        inputs = self.width
        for stage in range(1, 5):
            outputs = self.width * 2 ** (stage - 1)
            layers[f"stage{stage}"] = nn.Sequential(
                PreActBlock(inputs, outputs, stride=1 if stage == 1 else 2),
                PreActBlock(outputs, outputs, stride=1),
            )
            inputs = outputs
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(inputs, task.num_classes)
        return nn.Sequential(layers)
