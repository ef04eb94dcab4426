"""Surrogate: a clean network of the victim's kind, on which an attack works out its trigger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from purebench import AttackContext, fit
from purebench.model import reinitialise
from purebench.savepoint import Part
from purebench.seeding import derive, isolated
from purebench.training import Loss


def clean_network(
    ctx: AttackContext,
    epochs: int,
    *purpose: str,
    start: int | None = None,
    loss: Loss | None = None,
    kept: Sequence[Part] = (),
) -> nn.Module:
    """A network trained on the clean training split; in evaluation mode, its weights frozen.

    Args:
        epochs: of the training, by ``ctx.recipe`` in all else.
        purpose: names the training's chance.
        start: seed of the initial weights; without one they are the victim's own.
        loss, kept: as ``fit`` takes them.
    """
    seed = derive(ctx.seed, *purpose)
    with isolated(seed):  # dropout draws from the global generators
        model = ctx.build()
        if start is not None:
            reinitialise(model, start)
        fit(
            model,
            ctx.train,
            replace(ctx.recipe, epochs=epochs),
            seed=seed,
            progress=ctx.progress,
            label=purpose[0],
            loss=loss,
            savepoints=ctx.savepoints,
            kept=kept,
            static=loss is None,
        )
    return model.requires_grad_(False)


def surrogate(
    ctx: AttackContext, share: float, *, loss: Loss | None = None, kept: Sequence[Part] = ()
) -> nn.Module:
    """A clean network with initial weights of its own: the attacker does not know the victim's.

    Args:
        share: length of its training, as a share of the recipe's epochs; at least one epoch.
        loss, kept: as ``fit`` takes them.
    """
    epochs = max(1, round(share * ctx.recipe.epochs))
    start = derive(ctx.seed, "surrogate")
    return clean_network(ctx, epochs, "surrogate", "training", start=start, loss=loss, kept=kept)
