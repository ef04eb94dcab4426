"""Sparse: find and replace a few wrong entries of a trained layer, where no exact span holds.

The theory of exact recovery (Lu, Huang and Wang, arXiv:2407.11031) has each filter's change in
training in a span of few inputs. A deep network trained on many images has no such span, but the
inputs still shape its changes: a gradient is a sum of inputs, so changes vary where inputs do.
Ours makes that a prior instead of a constraint. Rows of a change are drawn from N(0, P), P their
own covariance drawn towards the second moment of benign inputs, and each entry is wrong with
probability eps. Expectation-maximisation (Dempster, Laird and Rubin 1977) alternates between what
every entry should be, given all others of its row, and whether it can be that; wrong entries are
given their expected value, and the others are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1.0  # variance of an entry that its row cannot predict, as a share of the mean
GROSS = 9.0  # variance of errors that are sought, at least, in the same unit
TRUST = 20.0  # rows that the inputs' second moment counts for, beside those of the layer
CHUNK = 2**24  # numbers in the matrices that are inverted together


@dataclass(frozen=True, eq=False)
class Imputed:
    """values (c, k): the change with wrong entries replaced. odds (c, k): probability of being
    wrong. eps: share of entries taken for wrong."""

    values: Tensor
    odds: Tensor
    eps: float


def impute(
    change: Tensor,
    moment: Tensor,
    *,
    known: Tensor | None = None,
    eps: float = 0.02,
    rounds: int = 4,
) -> Imputed:
    """Replace the entries of ``change`` (c, k) that their rows say are wrong.

    moment (k, k): second moment of the layer's inputs. known (c, k): entries surely wrong.
    eps: share first taken to be wrong, above 0 and below 1. rounds: of the iteration, at least 1.
    ValueError: shapes or settings that do not fit, or values that are not finite.
    """
    if change.ndim != 2 or moment.shape != (change.shape[1],) * 2:
        raise ValueError(
            f"expected change (c, k) and moment (k, k), got {tuple(change.shape)} "
            f"and {tuple(moment.shape)}"
        )
    if not 0 < eps < 1 or rounds < 1:
        raise ValueError(f"expected 0 < eps < 1 and rounds >= 1, got {eps} and {rounds}")
    if not (change.isfinite().all() and moment.isfinite().all()):
        raise ValueError("change and moment must be finite")
    D = change
    sure = torch.zeros_like(D).bool() if known is None else known
    unit = (1.4826 * D[~sure].abs().median()) ** 2 if (~sure).any() else D.square().mean()
    if not unit > 0:
        return Imputed(change.clone(), sure.to(change), float(sure.double().mean()))
    count, length = D.shape
    prior = moment.to(D) + 1e-6 * moment.diagonal().mean() * torch.eye(length).to(D)
    prior = prior / prior.diagonal().mean()
    P, share = prior * unit, torch.tensor(eps).to(D)
    noise = D.square().mean().clamp_min(GROSS * unit)  # variance of a wrong entry's error
    odds = torch.maximum((D.square() > GROSS * noise).to(D), sure.to(D))
    for _ in range(rounds):
        variance = torch.where(sure, 1e3 * noise, torch.where(odds > 0.5, noise, FLOOR * unit))
        expected, spread, covariance = _predict(D, P, variance)
        error = (D - expected).square()
        right = torch.log1p(-share) + _log_normal(error, spread + FLOOR * unit)
        wrong = torch.log(share) + _log_normal(error, spread + noise)
        odds = torch.sigmoid(wrong - right).masked_fill(sure, 1)
        share = odds[~sure].mean().clamp(1e-4, 0.5)
        excess = (odds * (error - spread).clamp_min(0))[~sure].sum()
        noise = excess / odds[~sure].sum().clamp_min(1e-9)
        scale = covariance.diagonal().mean()
        P = (count * covariance + TRUST * scale * prior) / (count + TRUST)
        unit = scale
        noise = noise.clamp_min(GROSS * unit)
    values = torch.where(odds > 0.5, expected, D)
    return Imputed(values.to(change), odds.to(change), float((odds > 0.5).double().mean()))


def _log_normal(square: Tensor, variance: Tensor) -> Tensor:
    return -(torch.log(variance) + square / variance) / 2


def _predict(D: Tensor, P: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each entry's mean and variance (c, k) given the others of its row, and the mean over the
    rows of the second moment (k, k) of what is behind D, which is seen with ``variance``."""
    count, length = D.shape
    means, spreads = torch.empty_like(D), torch.empty_like(D)
    hidden = torch.zeros_like(P)
    for rows in torch.arange(count, device=D.device).split(max(1, CHUNK // length**2)):
        seen = variance[rows]
        inverse = torch.linalg.inv(P + torch.diag_embed(seen))
        weighted = (inverse @ D[rows].unsqueeze(2))[..., 0]
        precision = inverse.diagonal(dim1=1, dim2=2)
        means[rows] = D[rows] - weighted / precision
        spreads[rows] = (1 / precision - seen).clamp_min(0)
        behind = weighted @ P
        hidden += behind.T @ behind + len(rows) * P - P @ inverse.sum(0) @ P
    return means, spreads, hidden / count
