"""Suspect: what the defenses share that filter the training set and train anew on what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from purebench import DefenseContext, NotApplicable, Split, Verdict, fit
from purebench.data import to_float
from purebench.layers import layer_inputs, weight_layers
from purebench.model import reinitialise

_BATCH = 500  # images a forward pass


def suspect_split(ctx: DefenseContext) -> Split:
    """The training split that the network was trained on. NotApplicable where it is not known."""
    if ctx.suspect is None:
        raise NotApplicable("the training set is not known")
    return ctx.suspect


def representations(
    model: nn.Module, split: Split, classes: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each class with images: the class, their indices (n,), and what enters the last weight
    layer on each of them (n, d)."""
    for label in range(classes):
        members = torch.nonzero(split.labels == label).flatten()
        if len(members):
            yield label, members, representation(model, split.images[members])


def representation(model: nn.Module, images: Tensor) -> Tensor:
    """(n, d): what enters the last weight layer on uint8 images."""
    _, last = weight_layers(model, images)[-1]
    return torch.cat([part.flatten(1) for part in layer_inputs(model, last, images)])


@torch.no_grad()
def image_losses(
    model: nn.Module, split: Split, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """(N,): ``loss`` (logits, labels) -> (n,) of every image, by the network as it is."""
    parts = zip(split.images.split(_BATCH), split.labels.split(_BATCH), strict=True)
    return torch.cat([loss(model(to_float(images)), labels) for images, labels in parts])


def train_without(model: nn.Module, verdict: Verdict, ctx: DefenseContext) -> nn.Module:
    """Give ``model`` fresh weights and train it, as the recipe says, on the suspect images that
    are not flagged. With none flagged it stays as it is."""
    split, ctx.verdict = suspect_split(ctx), verdict
    count = int(verdict.flagged.sum())
    ctx.notes["removed"] = count
    if not count:
        ctx.notes["warning"] = "no image was flagged: the network is returned unchanged"
        return model
    return fit(
        reinitialise(model, ctx.derive("fresh weights")),
        split[torch.nonzero(~verdict.flagged).flatten()],
        ctx.recipe,
        seed=ctx.derive("training"),
        progress=ctx.progress,
        label="training anew",
        notes=ctx.notes,
        static=True,
    )
