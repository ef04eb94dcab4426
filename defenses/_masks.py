"""Masks: one number in [0, 1] a channel, learnt on benign images, that scales its weight.

It acts on BatchNorm's scale, or in a network without BatchNorm on the weights of a convolution's
output channel. A bias is left alone, as in Wu and Wang, "Adversarial Neuron Pruning Purifies
Backdoored Deep Models", NeurIPS 2021, arXiv:2110.14430: a pruned channel becomes a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice

import torch
from torch import Tensor, nn
from torch.func import functional_call

from purebench.data import Split
from purebench.errors import NotApplicable
from purebench.evaluate import accuracy
from purebench.progress import Progress
from purebench.training import Recipe, batches

THRESHOLDS = tuple(step / 20 for step in range(20))  # 0, 0.05, ... 0.95

Site = nn.BatchNorm2d | nn.Conv2d
ByLayer = dict[str, Tensor]


def sites(model: nn.Module) -> dict[str, Site]:
    """Where channels are scaled: every BatchNorm, or every convolution where there is none."""
    layers = dict(model.named_modules())
    norms = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.BatchNorm2d) and layer.affine
    }
    convs = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    if not norms and not convs:
        raise NotApplicable("the network has neither a BatchNorm nor a convolution")
    return dict[str, Site](norms or convs)


class Masks:
    """The masks of one network, all ones at first.

    values: (C,) of all channels, site after site; a leaf that takes gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites = sites(model)
        self.sizes = [len(site.weight) for site in self.sites.values()]
        weight = next(iter(self.sites.values())).weight
        self.values = weight.new_ones(sum(self.sizes)).requires_grad_()
        self._fixed = {name: weight.detach() for name, weight in model.named_parameters()}
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def logits(self, images: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        """What the network gives with each channel's weight times ``scale`` and bias times
        ``shift``, both (C,). Running statistics of the network do not move."""
        scaled = dict(self._fixed)
        for name, part in self.split(scale).items():
            weight = self._fixed[f"{name}.weight"]
            scaled[f"{name}.weight"] = weight * part.view(-1, *[1] * (weight.ndim - 1))
        if shift is not None:
            for name, part in self.split(shift).items():
                if f"{name}.bias" in self._fixed:
                    scaled[f"{name}.bias"] = self._fixed[f"{name}.bias"] * part
        logits: Tensor = functional_call(self.model, {**scaled, **self._buffers}, (images,))
        return logits

    def split(self, values: Tensor) -> ByLayer:
        """(C,) values by site."""
        return dict(zip(self.sites, values.split(self.sizes), strict=True))

    def learn(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        split: Split,
        recipe: Recipe,
        *,
        steps: int,
        seed: int,
        progress: Progress,
        label: str,
    ) -> ByLayer:
        """Descend ``loss`` (images, labels) -> scalar by ``recipe``'s batch size, lr and momentum,
        batch statistics in BatchNorm; the masks stay in [0, 1]. Returns them by site."""
        optimiser = torch.optim.SGD([self.values], lr=recipe.lr, momentum=recipe.momentum)
        self.model.train()
        with progress.bar(label, steps, "step") as bar:
            for images, labels in islice(_endless(split, recipe, seed), steps):
                value = loss(images, labels)
                (self.values.grad,) = torch.autograd.grad(value, [self.values])
                optimiser.step()
                with torch.no_grad():
                    self.values.clamp_(0, 1)
                bar.step()
        self.model.eval()
        return self.split(self.values.detach())


def _endless(split: Split, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in count():
        yield from batches(split, recipe, seed, epoch)


def below(masks: ByLayer, threshold: float) -> ByLayer:
    """The channels whose mask is at most ``threshold``, by layer."""
    return {
        name: torch.nonzero(values <= threshold + 1e-6).flatten() for name, values in masks.items()
    }


@torch.no_grad()
def prune(model: nn.Module, channels: ByLayer) -> dict[str, list[int]]:
    """Set the weight of these ``channels`` to zero, and leave the bias. Returns the facts."""
    layers = dict(model.named_modules())
    for name, found in channels.items():
        layers[name].weight[found] = 0
    return {name: found.tolist() for name, found in channels.items()}


def prune_masked(
    model: nn.Module, masks: ByLayer, validation: Split, budget: float
) -> dict[str, object]:
    """Prune below the largest of ``THRESHOLDS`` up to which accuracy on ``validation`` stays within
    ``budget`` of what it was; nothing where the smallest costs more. Returns the facts."""
    floor = accuracy(model, validation) - budget
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    pruned: dict[str, list[int]] = {name: [] for name in masks}
    chosen = None
    for threshold in THRESHOLDS:
        found = prune(model, below(masks, threshold))
        if accuracy(model, validation) < floor - 1e-9:  # counts over counts: ties are meant
            break
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        pruned, chosen = found, threshold
    model.load_state_dict(kept)
    return {
        "threshold": chosen,
        "threshold_from": "benign accuracy",
        "pruned": pruned,
        "validation_floor": round(floor, 6),
        "validation_accuracy": round(accuracy(model, validation), 6),
    }
