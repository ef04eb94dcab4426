"""L1 regression agrees with an LP solver, and does not claim more than it can prove."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, sparse
from torch import Tensor

from purebench import DATASETS, LoadContext
from purebench.recovery.l1 import L1Fit, l1_regress

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def mnist_images() -> Tensor:
    """The first digits, (100, 1, 28, 28) in [0, 1]."""
    source = DATASETS["mnist"]().load(LoadContext(Path("unused"), offline=True))
    return source.train.images[:100].double() / 255


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def sparse_errors(rows: int, columns: int, eps: float, size: float = 5.0) -> Tensor:
    rng = torch.Generator().manual_seed(7)
    hit = torch.rand(rows, columns, generator=rng) < eps
    return size * normal(rows, columns, seed=8) * hit


def highs(A: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """A minimiser and the minimum, by linear programming."""
    rows, columns = A.shape
    identity = sparse.eye(rows)
    found = optimize.linprog(
        np.r_[np.zeros(columns), np.ones(2 * rows)],
        A_eq=sparse.hstack([sparse.csc_matrix(A.numpy()), identity, -identity]).tocsc(),
        b_eq=b.numpy(),
        bounds=[(None, None)] * columns + [(0, None)] * (2 * rows),
        method="highs",
    )
    return torch.from_numpy(found.x[:columns]), float(found.fun)


def agrees_with_highs(A: Tensor, B: Tensor, fit: L1Fit, unique: bool = True) -> None:
    for j, b in enumerate(B.T):
        u, least = highs(A, b)
        assert float(fit.objective[j]) == pytest.approx(least, rel=1e-8, abs=1e-8)
        if unique:
            torch.testing.assert_close(fit.coefficients[:, j], u, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("p", "n", "eps"), [(60, 1, 0.3), (120, 12, 0.4), (200, 60, 0.2)])
def test_sparse_errors_are_undone(p: int, n: int, eps: float) -> None:
    A, U = normal(p, n), normal(n, 24, seed=1)
    B = A @ U + sparse_errors(p, 24, eps)
    fit = l1_regress(A, B)
    assert set(fit.status) == {"exact"}
    torch.testing.assert_close(fit.coefficients, U, rtol=0, atol=1e-12)
    assert fit.fitted.equal(sparse_errors(p, 24, eps) == 0)
    agrees_with_highs(A, B[:, :3], l1_regress(A, B[:, :3]))


@pytest.mark.parametrize("noise", [1.0, 0.01])
def test_vertices_are_found_where_no_row_is_free_of_noise(noise: float) -> None:
    A = normal(150, 15)
    B = A @ normal(15, 6, seed=1) + sparse_errors(150, 6, 0.1) + noise * normal(150, 6, seed=2)
    fit = l1_regress(A, B)
    assert set(fit.status) == {"exact"}
    assert fit.fitted.sum(0).tolist() == [15] * 6  # no more than any vertex: nothing to believe
    agrees_with_highs(A, B, fit)


def test_digits_as_design(mnist_images: Tensor) -> None:
    """Border pixels are rows of zeros, and others are seen by few images."""
    A = mnist_images[:40].flatten(1).T
    U = normal(40, 16, seed=1)
    B = A @ U + sparse_errors(784, 16, 0.3)
    fit = l1_regress(A, B)
    assert set(fit.status) == {"exact"}
    torch.testing.assert_close(fit.coefficients, U, rtol=0, atol=1e-9)
    agrees_with_highs(A, B[:, :2], fit)
    unlit = (A == 0).all(1)
    assert unlit.sum() > 50
    assert not fit.fitted[unlit].any()


def test_patches_as_design(mnist_images: Tensor) -> None:
    """Many vertices, some nearly optimal: the minimum is certain, the truth is not."""
    A = torch.nn.functional.unfold(mnist_images[:10], 14, stride=14).transpose(1, 2)
    A = A.flatten(0, 1).T
    B = A @ normal(40, 8, seed=1) + sparse_errors(196, 8, 0.1, size=1.0)
    fit = l1_regress(A, B)
    assert fit.status.count("exact") >= 6
    agrees_with_highs(A, B, fit, unique=False)


def test_errors_of_any_size() -> None:
    A, U = normal(200, 20), normal(20, 6, seed=1)
    for size in (1e-6, 1e3, 1e9):
        fit = l1_regress(A, A @ U + sparse_errors(200, 6, 0.2, size))
        assert set(fit.status) == {"exact"}
        torch.testing.assert_close(fit.coefficients, U, rtol=0, atol=1e-12)


def test_degenerate_designs() -> None:
    """Rows twice and empty, columns that depend on others, right-hand sides of zeros."""
    A = normal(90, 12)
    A = torch.cat([A, A[:30], torch.zeros(10, 12).double()])
    A[:, 11] = A[:, 0] - A[:, 1]
    B = A @ normal(12, 5, seed=1) + sparse_errors(130, 5, 0.2)
    B[:, 2] = 0
    fit = l1_regress(A, B)
    assert fit.rank == 11
    assert set(fit.status) == {"exact"}
    assert not fit.coefficients[:, 2].any()
    agrees_with_highs(A, B, fit, unique=False)
    least = torch.linalg.pinv(A) @ (A @ fit.coefficients)  # the shortest of the equivalent
    torch.testing.assert_close(fit.coefficients, least, rtol=0, atol=1e-10)


def test_a_design_that_spans_everything_fits_everything() -> None:
    B = normal(10, 4)
    fit = l1_regress(normal(10, 15, seed=1), B)
    assert set(fit.status) == {"exact"}
    assert fit.fitted.all()
    assert float(fit.objective.max()) < 1e-12


@pytest.mark.parametrize(("n", "r"), [(0, 3), (3, 0), (3, 2)])
def test_nothing_to_fit(n: int, r: int) -> None:
    fit = l1_regress(torch.zeros(5, n), torch.ones(5, r))
    assert fit.coefficients.shape == (n, r)
    assert fit.objective.tolist() == [5.0] * r
    assert fit.status == ("exact",) * r


def test_the_gap_bounds_what_is_missing() -> None:
    A = normal(150, 15)
    B = A @ normal(15, 6, seed=1) + normal(150, 6, seed=2)
    fit = l1_regress(A, B, iterations=60, finish=False)
    for j, b in enumerate(B.T):
        missing = float(fit.objective[j]) - highs(A, b)[1]
        assert -1e-9 < missing <= float(fit.gap[j])
        assert fit.status[j] == "unconverged"
    closer = l1_regress(A, B, iterations=60, finish=False, tolerance=0.5)
    assert set(closer.status) == {"gap"}
    assert (l1_regress(A, B, iterations=600, finish=False).gap < fit.gap).all()


def test_single_precision() -> None:
    A, U = normal(300, 20), normal(20, 16, seed=1)
    B = A @ U + sparse_errors(300, 16, 0.2)
    fit = l1_regress(A.float(), B.float())
    assert fit.coefficients.dtype == fit.objective.dtype == torch.float32
    assert set(fit.status) == {"exact"}
    torch.testing.assert_close(fit.coefficients, U.float(), rtol=0, atol=1e-5)
    quick = l1_regress(A.float(), B.float(), iterations=200, finish=False)
    torch.testing.assert_close(quick.coefficients, U.float(), rtol=0, atol=1e-3)


def test_rounding_of_the_data_can_be_told() -> None:
    A, U = normal(300, 20), normal(20, 8, seed=1)
    B = (A @ U + sparse_errors(300, 8, 0.2)).float().double()
    assert (l1_regress(A, B, rounding=1e-6).fitted.sum(0) > 200).all()
    assert not (l1_regress(A, B).fitted.sum(0) > 100).any()


@pytest.mark.parametrize("delta", [0.3, 3.0])
def test_huber(delta: float) -> None:
    """Against its definition: no step from the minimiser, nor scipy, does better."""
    A = normal(80, 6)
    B = A @ normal(6, 3, seed=1) + sparse_errors(80, 3, 0.2) + 0.2 * normal(80, 3, seed=2)
    fit = l1_regress(A, B, delta=delta)
    assert set(fit.status) == {"exact"}
    for j, b in enumerate(B.T):

        def loss(u: np.ndarray, b: Tensor = b) -> tuple[float, np.ndarray]:
            e = b.numpy() - A.numpy() @ u
            small = abs(e) < delta
            value = np.where(small, e**2 / (2 * delta), abs(e) - delta / 2).sum()
            return float(value), -A.numpy().T @ np.clip(e / delta, -1, 1)

        best = optimize.minimize(loss, np.zeros(6), jac=True, method="BFGS", tol=1e-10)
        assert float(fit.objective[j]) == pytest.approx(best.fun, rel=1e-10)
        assert abs(loss(fit.coefficients[:, j].numpy())[1]).max() < 1e-10


def test_columns_do_not_depend_on_their_company() -> None:
    A = normal(200, 20)
    B = A @ normal(20, 40, seed=1) + sparse_errors(200, 40, 0.3)
    together = l1_regress(A, B).coefficients
    alone = torch.cat([l1_regress(A, b[:, None]).coefficients for b in B.T], 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("A", "B", "settings", "reason"),
    [
        (torch.ones(3, 2), torch.ones(3), {}, "right-hand sides are columns"),
        (torch.ones(3, 2), torch.ones(4, 2), {}, r"\(3, 2\) and \(4, 2\)"),
        (torch.ones(3, 2), torch.ones(3, 2).double(), {}, "float32 or both float64"),
        (torch.ones(3, 2).long(), torch.ones(3, 2).long(), {}, "int64"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 2), {}, "A holds values that are not finite"),
        (torch.ones(3, 2), torch.full((3, 2), torch.inf), {}, "B holds values that are not finite"),
        (torch.ones(3, 2), torch.ones(3, 2), {"delta": -1.0}, "delta >= 0"),
        (torch.ones(3, 2), torch.ones(3, 2), {"iterations": 0}, "iterations >= 1"),
    ],
)
def test_bad_input_is_refused(
    A: Tensor, B: Tensor, settings: dict[str, float], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        l1_regress(A, B, **settings)  # type: ignore[arg-type]


def test_cuda(gpu: torch.device) -> None:
    A, U = normal(300, 40).to(gpu), normal(40, 64, seed=1).to(gpu)
    fit = l1_regress(A, A @ U + sparse_errors(300, 64, 0.2).to(gpu))
    assert set(fit.status) == {"exact"}
    torch.testing.assert_close(fit.coefficients, U, rtol=0, atol=1e-12)
