"""Robust ridge regression against closed forms, and the basis of what inputs excite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from purebench.recovery.refit import excited_basis, robust_ridge


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def problem(rng: torch.Generator, rows: int = 300) -> tuple[Tensor, Tensor]:
    X = torch.randn(rows, 12, generator=rng, dtype=torch.float64)
    X = X * torch.linspace(0.05, 3, 12, dtype=torch.float64) + 2
    truth = torch.randn(12, 5, generator=rng, dtype=torch.float64)
    noise = 0.1 * torch.randn(rows, 5, generator=rng, dtype=torch.float64)
    return X, X @ truth + 1 + noise


def closed_form(X: Tensor, z: Tensor, w: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weighted ridge with an offset, one column, from its normal equations."""
    w = w / w.sum()
    mean = w @ X
    S = (X - mean).T @ ((X - mean) * w[:, None])
    r = strength * S.diagonal().mean()
    v = torch.linalg.solve(S + r * torch.eye(len(S)), (X - mean).T @ (w * (z - w @ z)))
    return v, w @ z - mean @ v


@pytest.mark.parametrize("strength", [1e-3, 0.3, 5.0])
def test_least_squares(rng: torch.Generator, strength: float) -> None:
    X, Z = problem(rng)
    fit = robust_ridge(X, Z, strength, rounds=0, tolerance=1e-10)
    for column in range(5):
        v, c = closed_form(X, Z[:, column], torch.ones(len(X), dtype=torch.float64), strength)
        torch.testing.assert_close(fit.weight[:, column], v)
        torch.testing.assert_close(fit.offset[column], c)


def test_without_an_intercept(rng: torch.Generator) -> None:
    """Ridge through the origin, from its normal equations."""
    X, Z = problem(rng)
    fit = robust_ridge(X, Z, 0.3, intercept=False, rounds=0, tolerance=1e-10)
    S = X.T @ X / len(X)
    r = 0.3 * S.diagonal().mean()
    v = torch.linalg.solve(S + r * torch.eye(len(S)), X.T @ Z / len(X))
    torch.testing.assert_close(fit.weight, v)
    assert not fit.offset.any()


def test_a_scale_says_which_inputs_are_penalised_less(rng: torch.Generator) -> None:
    """The penalty written out: r |v / scale|^2, r a share of the scaled inputs' mean variance."""
    X, Z = problem(rng)
    scale = torch.linspace(0, 2, 12, dtype=torch.float64)
    fit = robust_ridge(X, Z, 0.3, scale=scale, rounds=0, tolerance=1e-10)
    assert not fit.weight[0].any()
    X, scale = X[:, 1:], scale[1:]
    S = (X - X.mean(0)).T @ (X - X.mean(0)) / len(X)
    r = 0.3 * (S.diagonal() * scale**2).sum() / 12
    v = torch.linalg.solve(S + r * torch.diag(scale**-2), (X - X.mean(0)).T @ Z / len(X))
    torch.testing.assert_close(fit.weight[1:], v)
    torch.testing.assert_close(fit.offset, Z.mean(0) - X.mean(0) @ v)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_inputs_that_never_vary_explain_nothing(rng: torch.Generator, value: float) -> None:
    """As behind a layer that is dead: no weight, and the mean as the offset."""
    X, Z = torch.full((300, 12), value), torch.randn(300, 5, generator=rng)
    X += 1e-9 * value * torch.randn(X.shape, generator=rng)
    fit = robust_ridge(X, Z, 0.015, weights=torch.rand(Z.shape, generator=rng), rounds=0)
    given = X[:1] @ fit.weight + fit.offset
    assert given.isfinite().all()
    torch.testing.assert_close(given[0], Z.mean(0), atol=0.2, rtol=0)


def test_each_column_has_its_own_weights(rng: torch.Generator) -> None:
    X, Z = problem(rng)
    weights = torch.rand(Z.shape, generator=rng, dtype=torch.float64) ** 4
    fit = robust_ridge(X, Z, 0.3, weights=weights, rounds=0, tolerance=1e-10)
    for column in range(5):
        own = weights[:, column] / weights[:, column].mean() + 1e-3
        v, c = closed_form(X, Z[:, column], own, 0.3)
        torch.testing.assert_close(fit.weight[:, column], v)
        torch.testing.assert_close(fit.offset[column], c)


def test_outliers_count_less(rng: torch.Generator) -> None:
    X, Z = problem(rng)
    clean = robust_ridge(X, Z, 1e-3, rounds=0).weight
    spoiled = Z.clone()
    spoiled[:30, 2] += 50
    errors = [
        float((robust_ridge(X, spoiled, 1e-3, rounds=rounds).weight - clean)[:, 2].norm())
        for rounds in (0, 8)
    ]
    assert errors[1] < 0.05 * errors[0]
    untouched = robust_ridge(X, spoiled, 1e-3, rounds=8).weight[:, 0]
    alone = robust_ridge(X, Z, 1e-3, rounds=8).weight[:, 0]
    torch.testing.assert_close(untouched, alone, rtol=1e-3, atol=1e-3)


def test_effective_rank_counts_what_is_kept() -> None:
    X = torch.eye(8, dtype=torch.float64).repeat(10, 1)
    X[:, 4:] = 0  # four directions excited alike, centred on a fifth of their square
    S = (X - X.mean(0)).T @ (X - X.mean(0)) / len(X)
    r = 0.5 * S.diagonal().mean()
    expected = torch.linalg.solve(S + r * torch.eye(8), S).diagonal().sum()
    assert robust_ridge(X, X[:, :2], 0.5).effective_rank == pytest.approx(float(expected))


def test_dead_inputs_and_outputs(rng: torch.Generator) -> None:
    X, Z = torch.zeros(20, 3), torch.zeros(20, 2)
    Z[:, 1] = 7
    fit = robust_ridge(X, Z, 0.1, weights=torch.zeros_like(Z))
    assert torch.equal(fit.weight, torch.zeros(3, 2))
    torch.testing.assert_close(fit.offset, torch.tensor([0.0, 7.0]))


@pytest.mark.parametrize(
    ("X", "Z", "strength", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 1), 0.1, "equal N"),
        (torch.zeros(0, 2), torch.zeros(0, 1), 0.1, "equal N"),
        (torch.zeros(3, 2), torch.zeros(3, 1), 0.0, "strength"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 1), 0.1, "finite"),
    ],
)
def test_refuses(X: Tensor, Z: Tensor, strength: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        robust_ridge(X, Z, strength)


def test_refuses_weights_of_another_shape() -> None:
    with pytest.raises(ValueError, match="weights"):
        robust_ridge(torch.zeros(3, 2), torch.zeros(3, 2), 0.1, weights=torch.zeros(3, 1))


def test_refuses_a_scale_of_another_shape() -> None:
    with pytest.raises(ValueError, match="scale"):
        robust_ridge(torch.zeros(3, 2), torch.zeros(3, 2), 0.1, scale=torch.zeros(3))


def test_excited_basis(rng: torch.Generator) -> None:
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64)).Q
    spectrum = torch.tensor([8.0, 4.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64)  # mean 2.25
    moment = rotation @ torch.diag(spectrum) @ rotation.T
    for strength, rank in ((1.0, 2), (0.4, 3), (1e-6, 4), (100.0, 1)):
        basis = excited_basis(moment, strength)
        assert basis.shape == (6, rank)
        expected = rotation[:, :rank] @ rotation[:, :rank].T
        torch.testing.assert_close(basis @ basis.T, expected)
