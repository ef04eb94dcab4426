"""Channels: how active each is on benign data, which stand out, and how to silence one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from purebench.data import Split
from purebench.errors import NotApplicable
from purebench.evaluate import accuracy
from purebench.layers import hooked, layer_inputs, layer_outputs, norm_after, weight_layers


@dataclass(eq=False)
class Channels:
    """The output channels of one convolution, with the BatchNorm behind it where there is one.

    head: where a shortcut's outputs are added to theirs, the linear layer that takes the sums. A
        channel is then one of the sums', as in BackdoorBench, and silent where the head's weights
        of it are zero.
    """

    name: str
    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None
    head: nn.Linear | None = None

    def __len__(self) -> int:
        return self.conv.out_channels

    def silence(self, channels: Tensor) -> None:
        """Make these channels' outputs, after the norm, zero for every input."""
        for weights, places in self._silent(channels):
            weights.data[places] = 0

    @contextmanager
    def held(self, channels: Tensor) -> Iterator[None]:
        """Silent channels stay silent in what is trained as long as the context lasts."""
        handles = []
        for weights, places in self._silent(channels):
            mask = torch.ones_like(weights)
            mask[places] = 0
            handles.append(weights.register_hook(mask.mul))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _silent(self, channels: Tensor) -> Iterator[tuple[Tensor, Any]]:
        """(weights, places in them) that are zero where these channels are silent."""
        if self.head is not None:
            columns = torch.arange(self.head.in_features).view(len(self), -1)
            yield self.head.weight, (slice(None), columns[channels.cpu()].flatten())
            return
        for module in (self.conv, self.norm):
            if module is not None:
                yield module.weight, channels
                if module.bias is not None:
                    yield module.bias, channels


def convolutions(model: nn.Module, images: Tensor) -> list[tuple[str, nn.Conv2d]]:
    """(name, layer) in the order data passes. NotApplicable where there is none."""
    convs = [
        (name, layer)
        for name, layer in weight_layers(model, images)
        if isinstance(layer, nn.Conv2d)
    ]
    if not convs:
        raise NotApplicable("the network has no convolution")
    return convs


def every_channels(model: nn.Module, images: Tensor) -> list[Channels]:
    """Of every convolution, in the order data passes. NotApplicable where there is none."""
    return [
        Channels(name, conv, norm_after(model, conv, images))
        for name, conv in convolutions(model, images)
    ]


def last_channels(model: nn.Module, images: Tensor) -> Channels:
    """Of the last convolution that data passes. NotApplicable where there is none."""
    name, conv = convolutions(model, images)[-1]
    norm = norm_after(model, conv, images)
    return Channels(name, conv, norm, _takes_sums(model, conv, norm or conv, images))


def _takes_sums(
    model: nn.Module, conv: nn.Conv2d, last: nn.Module, images: Tensor
) -> nn.Linear | None:
    """The linear layer behind the convolution, where something else reaches it than what ``last``,
    the convolution or its norm, gives: a shortcut."""
    layers = [layer for _, layer in weight_layers(model, images)]
    head = next(iter(layers[layers.index(conv) + 1 :]), None)
    if not isinstance(head, nn.Linear) or head.in_features % conv.out_channels:
        return None
    with hooked([last], lambda _, __, output: torch.zeros_like(output)):
        (rest,) = layer_inputs(model, head, images[:2])
    return head if rest.ndim == 2 and rest.any() else None


def outliers(values: Tensor, u: float) -> Tensor:
    """Indices of what lies more than ``u`` sample standard deviations above the mean of
    ``values`` (C,). None of C values can where u >= (C - 1) / sqrt(C): at u = 3, of ten or less."""
    return torch.nonzero(values > values.mean() + u * values.std()).flatten()


def activity(model: nn.Module, channels: Channels, images: Tensor) -> Tensor:
    """(C,) mean of each channel's output behind a ReLU, over uint8 images and positions; of a sum
    as it enters the head."""
    total, count = torch.zeros(len(channels), dtype=torch.float64), 0
    if channels.head is not None:
        for inputs in layer_inputs(model, channels.head, images):
            total += inputs.reshape(len(inputs), len(channels), -1).double().mean(2).sum(0).cpu()
        return total / len(images)
    for outputs in layer_outputs(model, channels.norm or channels.conv, images):
        total += outputs.relu().double().mean((2, 3)).sum(0).cpu()
        count += len(outputs)
    return total / count


def prune_inactive(
    model: nn.Module, fit: Split, validation: Split, budget: float, steps: int
) -> dict[str, object]:
    """Silence the last convolution's channels, least active on ``fit`` first, as long as
    accuracy on ``validation`` stays within ``budget`` of what it was. Returns the facts.

    steps: at most so many tests of the accuracy.
    """
    channels = last_channels(model, fit.images)
    active = activity(model, channels, fit.images)
    order = active.argsort(stable=True)
    floor = accuracy(model, validation) - budget
    kept = model.state_dict()
    kept = {name: value.clone() for name, value in kept.items()}
    pruned = 0
    for part in order.tensor_split(min(steps, len(order)))[:-1]:  # one part is left alive
        channels.silence(part)
        if accuracy(model, validation) < floor:
            break
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        pruned += len(part)
    model.load_state_dict(kept)
    return {
        "layer": channels.name,
        "channels": len(channels),
        "pruned": sorted(order[:pruned].tolist()),
        "validation_floor": round(floor, 6),
        "validation_accuracy": round(accuracy(model, validation), 6),
    }
