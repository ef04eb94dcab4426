"""Passes: through a network with other weights, or on images that its statistics must not see.

BatchNorm's running statistics belong to benign images at the network's own weights. What these
passes compute leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from purebench.data import to_float
from purebench.errors import NotApplicable
from purebench.layers import weight_layers


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """``model`` with these weights in the place of its own of the same names. In training mode it
    updates copies of the running statistics."""

    def network(images: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        logits: Tensor = functional_call(model, {**buffers, **weights}, (images,))
        return logits

    return network


@torch.no_grad()
def renew_statistics(model: nn.Module, images: Tensor, batch_size: int) -> None:
    """Running statistics become the mean over batches of uint8 ``images``."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    model.train()
    for part in images.tensor_split(-(-len(images) // batch_size)):
        model(to_float(part))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def head(model: nn.Module, images: Tensor) -> nn.Linear:
    """The linear layer that gives the logits. NotApplicable where the last layer is another."""
    name, layer = weight_layers(model, images)[-1]
    if not isinstance(layer, nn.Linear):
        raise NotApplicable(f"the last weight layer, {name}, is not linear")
    return layer
