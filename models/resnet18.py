"""ResNet-18: torchvision's residual network, with a stem for small images.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385.
Blocks and initial weights are torchvision's, untrained. The small stem is one 3x3 convolution of
stride 1 and no max-pooling, as is usual for 32x32 images. ReLUs are not in place, so that a hook
may keep the output of the layer before one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from torchvision.models import resnet18

from purebench import MODELS, Architecture, Normalise, Task


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
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalise=Normalise(task))
        layers.update(resnet18(weights=None, num_classes=task.num_classes).named_children())
        if self.stem == "small":
            layers["conv1"] = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            del layers["maxpool"]
        else:
            layers["conv1"] = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(layers["conv1"].weight, mode="fan_out", nonlinearity="relu")
        layers["flatten"] = nn.Flatten()
        layers.move_to_end("fc")
        model = nn.Sequential(layers)
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        return model
