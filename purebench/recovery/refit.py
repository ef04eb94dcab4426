"""Refit: a layer's map as benign inputs determine it, by robust ridge regression.

A layer takes rows x to z = W x. What benign rows do not excite, they cannot vouch for, and a back
door can hide there. The ridge solution of z on x is W seen through S (S + r)^-1, S the covariance
of x: directions that benign data excite come back whole, the others shrink to nothing, smoothly.
With a scale an input has the less claim to weight the smaller its scale is.
Residual rows count less the larger they are (Huber 1964), for a channel that carries a back door
leaves its outliers in z. After Lu, Huang and Wang, arXiv:2407.11031, who regress the weights
themselves and with L1; the regression of outputs, layer by layer, is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

CORNER = 1.345  # of the Huber loss, in standard deviations of a normal residual: its usual value


@dataclass(frozen=True, eq=False)
class Refit:
    """z ~ x weight + offset: weight (k, c), offset (c,), zeros where none was asked for.

    effective_rank: trace of S (S + r)^-1, at most k: how much of the input space is kept.
    """

    weight: Tensor
    offset: Tensor
    effective_rank: float


def robust_ridge(
    X: Tensor,
    Z: Tensor,
    strength: float,
    *,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    intercept: bool = True,
    rounds: int = 2,
    tolerance: float = 1e-3,
) -> Refit:
    """min over v, c of sum_s w_s huber(z_s - x_s v - c) + r |v / scale|^2, for each column of Z.

    All columns are solved together by conjugate gradients, which meet the weights of a column
    only in products; the common part of the weights is factored once and preconditions them.

    Args:
        X: (N, k) rows of inputs. Z: (N, c) what they are to be mapped to. One floating type.
        strength: r as a share of the mean variance of the inputs times their scale, above 0;
            without an intercept, of their mean second moment.
        weights: (N, c), not negative: how much a row matters to a column; None: all alike.
        scale: (k,), not negative: how readily an input is given weight, 0 being never; None: 1.
        intercept: whether there is a c; where a layer has nowhere to put it, c is 0.
        rounds: of reweighting towards the Huber loss; 0 is least squares.
        tolerance: of the solution, relative, in the norm of the problem.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or strength <= 0.
    """
    if X.ndim != 2 or Z.ndim != 2 or len(X) != len(Z) or len(X) == 0:
        raise ValueError(f"X (N, k) and Z (N, c) need equal N > 0, got {X.shape} and {Z.shape}")
    if weights is not None and weights.shape != Z.shape:
        raise ValueError(f"weights must be {tuple(Z.shape)}, got {tuple(weights.shape)}")
    if scale is not None and scale.shape != X.shape[1:]:
        raise ValueError(f"scale must be {tuple(X.shape[1:])}, got {tuple(scale.shape)}")
    if not strength > 0:
        raise ValueError(f"strength must be above 0, got {strength}")
    if not (X.isfinite().all() and Z.isfinite().all()):
        raise ValueError("X and Z must be finite")
    if scale is not None:
        X = X * scale
    least = torch.finfo(X.dtype).eps * X.square().mean() + torch.finfo(X.dtype).tiny
    centre = X.mean(0) if intercept else torch.zeros_like(X[0])
    X = X - centre
    importance = torch.ones_like(Z) if weights is None else _positive(weights)
    shared = importance.mean(1) / importance.mean(1).sum()
    covariance = _covariance(X, shared, intercept)
    variance = covariance.diagonal().mean().clamp_min(least)  # of a dead layer's it is rounding
    damped = covariance + strength * variance * torch.eye(X.shape[1], dtype=X.dtype).to(X)
    factor = torch.linalg.cholesky(damped.double())
    kept = torch.cholesky_solve(covariance.double(), factor).diagonal().sum()
    factor = factor.to(X.dtype)
    solve = partial(_solve, X, Z, strength, least, intercept, factor, tolerance)
    solution, offset = solve(importance, None)
    for _ in range(rounds):
        residual = (Z - X @ solution - offset).abs()
        corner = CORNER * 1.4826 * residual.median(0).values
        floor = torch.finfo(X.dtype).eps * Z.abs().amax(0) + torch.finfo(X.dtype).tiny
        trust = ((corner + floor) / (residual + floor)).clamp_max(1)
        solution, offset = solve(importance * trust, solution)
    offset = offset - centre @ solution
    return Refit(solution if scale is None else solution * scale[:, None], offset, float(kept))


def _positive(weights: Tensor) -> Tensor:
    """Weights of mean 1 a column, with a floor, so that no column is left without rows."""
    return weights / weights.mean(0).clamp_min(torch.finfo(weights.dtype).tiny) + 1e-3


def _covariance(X: Tensor, share: Tensor, centred: bool) -> Tensor:
    mean = share @ X if centred else torch.zeros_like(X[0])
    return (X * share[:, None]).T @ X - mean[:, None] * mean


def _solve(
    X: Tensor,
    Z: Tensor,
    strength: float,
    least: Tensor,
    intercept: bool,
    factor: Tensor,
    tolerance: float,
    weights: Tensor,
    start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weighted ridge, a weight a row and column, by preconditioned conjugate gradients."""
    share = weights / weights.sum(0)
    mean_x, mean_z = share.T @ X, (share * Z).sum(0)  # (c, k) and (c,)
    if not intercept:
        mean_x, mean_z = torch.zeros_like(mean_x), torch.zeros_like(mean_z)
    variance = (share.T @ X.square() - mean_x.square()).mean(1)
    ridge = strength * variance.clamp_min(least)

    def normal(V: Tensor) -> Tensor:
        centred = X @ V - (mean_x * V.T).sum(1)
        return X.T @ (share * centred) + ridge * V

    right = X.T @ (share * (Z - mean_z))
    solution = torch.zeros_like(right) if start is None else start
    residual = right - normal(solution)
    step = direction = torch.cholesky_solve(residual, factor)
    size = (residual * step).sum(0)
    enough = tolerance**2 * (right * torch.cholesky_solve(right, factor)).sum(0)
    tiny = torch.finfo(X.dtype).tiny
    for _ in range(100):
        if bool((size <= enough).all()):
            break
        image = normal(direction)
        length = size / (direction * image).sum(0).clamp_min(tiny)
        solution = solution + length * direction
        residual = residual - length * image
        step = torch.cholesky_solve(residual, factor)
        before, size = size, (residual * step).sum(0)
        direction = step + size / before.clamp_min(tiny) * direction
    return solution, mean_z - (mean_x * solution.T).sum(1)


def excited_basis(moment: Tensor, strength: float) -> Tensor:
    """Orthonormal (k, r) basis of what inputs excite: the eigenvectors of their second moment
    (k, k) whose eigenvalue exceeds ``strength`` times the mean one; at least one."""
    values, vectors = torch.linalg.eigh(moment.double())
    chosen = values > strength * values.mean()
    chosen[-1] = True
    basis: Tensor = vectors[:, chosen].to(moment.dtype)
    return basis
