"""ResNet-18: torchvision's residual network, with a stem for small images.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385.
Layers and initial weights are torchvision's, untrained. The small stem is one 3x3 convolution of
stride 1 and no max-pooling, as is usual for 32x32 images. ReLUs and sums are not in place, so that
a hook may keep the output of the layer before one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from purebench import MODELS, Architecture, Normalise, Task


class Block(BasicBlock):  # type: ignore[misc]
    """torchvision's block, its sum out of place."""

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        total: Tensor = self.relu(residual + shortcut)
        return total


@MODELS.register("resnet18")
@dataclass(frozen=True)
class ResNet18(Architecture):
    """Images of any size from 16x16 on, with the ImageNet stem from 32x32 on.

    stem: small (3x3, stride 1) or imagenet (7x7, stride 2, then max-pooling).
    """

    paper: ClassVar[str] = "He et al. 2016, arXiv:1512.03385"
    stem: Literal["small", "imagenet"] = "small"

    def __post_init__(self) -> None:
        if self.stem not in ("small", "imagenet"):
            raise ValueError(f"stem must be small or imagenet, got {self.stem!r}")

    def build(self, task: Task) -> nn.Module:
        channels, height, width = task.shape
        least = 16 if self.stem == "small" else 32
        if min(height, width) < least:
            raise ValueError(
                f"resnet18 with the {self.stem} stem takes images of {least}x{least} and larger, "
                f"got {height}x{width}"
            )
        kernel, stride = (3, 1) if self.stem == "small" else (7, 2)
        stem = nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalise=Normalise(task))
        layers.update(ResNet(Block, [2, 2, 2, 2], task.num_classes).named_children())
        layers["conv1"] = stem
        if self.stem == "small":
            del layers["maxpool"]
        layers["flatten"] = nn.Flatten()
        layers.move_to_end("fc")
        model = nn.Sequential(layers)
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        return model
