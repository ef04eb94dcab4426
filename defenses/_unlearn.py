"""Unlearn: gradient ascent on benign images, until the network knows them no better than told.

What moves first and farthest is what the clean task leans on least: Li et al., "Reconstructive
Neuron Pruning for Backdoor Defense", ICML 2023, arXiv:2305.14876; Lin et al., NeurIPS 2024,
arXiv:2405.20291.
"""

from __future__ import annotations

from itertools import count, islice

import torch
from torch import nn
from torch.nn import functional as F

from purebench.data import Split
from purebench.evaluate import accuracy
from purebench.progress import Progress
from purebench.training import Recipe, batches


def unlearn(
    model: nn.Module,
    split: Split,
    validation: Split,
    recipe: Recipe,
    *,
    floor: float,
    steps: int,
    clip: float,
    seed: int,
    progress: Progress,
) -> dict[str, object]:
    """Raise the cross-entropy on ``split`` in place, by ``recipe``'s batch size, lr, momentum and
    weight decay, until accuracy on ``validation`` is at most ``floor``, asked after every step.
    The network is left in evaluation mode. Returns the facts.

    steps: at most so many. clip: largest norm of a gradient.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.SGD(
        weights, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    taken, left = 0, accuracy(model, validation)
    stream = (batch for epoch in count() for batch in batches(split, recipe, seed, epoch))
    with progress.bar("unlearning", steps, "step") as bar:
        for images, labels in islice(stream, steps):
            if left <= floor:
                break
            model.train()
            optimiser.zero_grad(set_to_none=True)
            (-F.cross_entropy(model(images), labels)).backward()
            nn.utils.clip_grad_norm_(weights, clip)
            optimiser.step()
            model.eval()
            taken, left = taken + 1, accuracy(model, validation)
            bar.step(accuracy=left)
    optimiser.zero_grad(set_to_none=True)
    model.eval()
    return {"unlearning_steps": taken, "unlearnt_accuracy": round(left, 6)}
