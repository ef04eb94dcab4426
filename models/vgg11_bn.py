"""VGG-11 with BatchNorm: torchvision's convolutions under one linear layer.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, arXiv:1409.1556, configuration A. Layers are torchvision's, with its initial weights,
untrained. Its classifier of three linear layers expects 7x7 features, which a 32x32 image does not
give (they are 1x1); as is usual for such images, ours is an average pool to 1x1 and one linear
layer. ReLUs are not in place, so that a hook may keep the output of the layer before one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from purebench import MODELS, Architecture, Normalise, Task


@MODELS.register("vgg11_bn")
@dataclass(frozen=True)
class VGG11BN(Architecture):
    """Images of any size from 32x32 on, which its five halvings need; no settings."""

    paper: ClassVar[str] = "Simonyan and Zisserman 2015, arXiv:1409.1556"

    def build(self, task: Task) -> nn.Module:
        channels, height, width = task.shape
        if min(height, width) < 32:
            raise ValueError(f"vgg11_bn takes images of 32x32 and larger, got {height}x{width}")
        features = make_layers(cfgs["A"], batch_norm=True)
        features[0] = nn.Conv2d(channels, 64, 3, padding=1)
        for name, weight in features.named_parameters():
            if weight.dim() == 4:
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        for module in features:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        head = nn.Linear(512, task.num_classes)
        nn.init.normal_(head.weight, 0, 0.01)
        nn.init.zeros_(head.bias)
        return nn.Sequential(
            OrderedDict(
                normalise=Normalise(task),
                features=features,
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                head=head,
            )
        )
