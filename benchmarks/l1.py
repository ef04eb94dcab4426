"""L1: robust regression by Purebench, HiGHS, IRLS and scikit-learn, side by side at one thread.

    python -m benchmarks.l1 [--full] [--figure growth.png]

Each is to find U of B = A U + Z: Gaussian A (p, n) and U (n, r), and Z with a share eps of its
entries five times that size. The truth being known, the error is the worst column's, relative.

Contestants:
    ours: purebench.recovery.l1, all right-hand sides together.
    HiGHS, primal and dual: scipy.optimize.linprog on min sum(e+ + e-), A u + e+ - e- = b, and on
        max b.y, A^T y = 0, |y| <= 1, of which u is the multiplier; a right-hand side at a time.
    IRLS: weighted least squares with weights 1 / max(|e|, floor), all right-hand sides together,
        the floor falling by half an iteration, 50 iterations.
    scikit-learn: QuantileRegressor without penalty and intercept; a right-hand side at a time.

All but ours take time in proportion to right-hand sides, or nearly so; without --full they are run
on the first few, and their seconds scaled up. The table says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import optimize, sparse
from tabulate import tabulate
from torch import Tensor

from purebench.recovery.l1 import l1_regress

from ._timing import Times, conditions, interleave

SLOW_COLUMNS = {"HiGHS primal": 2, "HiGHS dual": 4, "IRLS": 16, "scikit-learn": 2}


@dataclass(frozen=True)
class Size:
    """rows x columns, right-hand sides, share of contaminated entries."""

    rows: int
    columns: int
    targets: int
    eps: float = 0.2

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}, {self.targets}, {self.eps:g}"

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (p, n), the true U (n, r) and B (p, r), float64."""
        rng = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=rng, dtype=torch.float64)
        A, U = normal(self.rows, self.columns), normal(self.columns, self.targets)
        hit = torch.rand(self.rows, self.targets, generator=rng) < self.eps
        spread = 5 * self.columns**0.5  # of A U, five times
        return A, U, A @ U + spread * hit * normal(self.rows, self.targets)


TABLE = (Size(196, 40, 512), Size(1024, 200, 256))
FULL = (Size(4608, 100, 512, 0.3), Size(4608, 500, 64, 0.3))  # ours alone: hours for the others
GROWTH = {
    "rows": [Size(rows, 50, 64) for rows in (250, 500, 1000, 2000)],
    "columns": [Size(1000, columns, 64) for columns in (25, 50, 100, 200)],
    "right-hand sides": [Size(500, 50, targets) for targets in (32, 64, 128, 256, 512)],
}


def ours(A: Tensor, B: Tensor) -> Tensor:
    return l1_regress(A, B).coefficients


def highs_primal(A: Tensor, B: Tensor) -> Tensor:
    rows, columns = A.shape
    identity = sparse.eye(rows)
    equations = sparse.hstack([sparse.csc_matrix(A.numpy()), identity, -identity]).tocsc()
    cost = np.r_[np.zeros(columns), np.ones(2 * rows)]
    bounds = [(None, None)] * columns + [(0, None)] * (2 * rows)
    found = [
        optimize.linprog(cost, A_eq=equations, b_eq=b, bounds=bounds, method="highs").x[:columns]
        for b in B.T.numpy()
    ]
    return torch.from_numpy(np.stack(found, 1))


def highs_dual(A: Tensor, B: Tensor) -> Tensor:
    zero = np.zeros(A.shape[1])
    found = [
        -optimize.linprog(
            -b, A_eq=A.T.numpy(), b_eq=zero, bounds=(-1, 1), method="highs"
        ).eqlin.marginals
        for b in B.T.numpy()
    ]
    return torch.from_numpy(np.stack(found, 1))


def irls(A: Tensor, B: Tensor, iterations: int = 50) -> Tensor:
    U: Tensor = torch.linalg.lstsq(A, B).solution
    floor = (B - A @ U).abs().mean(0)
    for _ in range(iterations):
        weights = 1 / torch.maximum((B - A @ U).abs(), floor)
        grams = torch.stack([(A.T * w) @ A for w in weights.T])
        U = torch.linalg.solve(grams, (weights * B).T @ A).T
        floor = floor / 2
    return U


def scikit_learn(A: Tensor, B: Tensor) -> Tensor:
    from sklearn.linear_model import QuantileRegressor

    model = QuantileRegressor(quantile=0.5, alpha=0, fit_intercept=False, solver="highs")
    found = [model.fit(A.numpy(), b).coef_.copy() for b in B.T.numpy()]
    return torch.from_numpy(np.stack(found, 1))


CONTESTANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "HiGHS primal": highs_primal,
    "HiGHS dual": highs_dual,
    "IRLS": irls,
    "scikit-learn": scikit_learn,
}


@dataclass(frozen=True)
class Result:
    """Of one contestant at one size: CPU seconds for all right-hand sides, median of the rounds."""

    size: Size
    name: str
    seconds: float
    timed: int
    error: float


def measure(size: Size, names: Sequence[str], limits: dict[str, int], repeats: int) -> list[Result]:
    """Contestants in turn; ``limits``: right-hand sides that a contestant is timed on."""
    A, truth, B = size.draw()
    errors: dict[str, float] = {}

    def run(name: str, timed: int, times: Times) -> None:
        with times.measured():
            found = CONTESTANTS[name](A, B[:, :timed])
        off = (found - truth[:, :timed]).norm(dim=0) / truth[:, :timed].norm(dim=0)
        errors[name] = float(off.max())

    counts = {name: min(limits.get(name, size.targets), size.targets) for name in names}
    times = interleave({name: partial(run, name, counts[name]) for name in names}, repeats)
    return [
        Result(
            size=size,
            name=name,
            seconds=float(np.median(times[name].cpu_seconds)) * size.targets / counts[name],
            timed=counts[name],
            error=errors[name],
        )
        for name in names
    ]


def rows_of(results: Sequence[Result]) -> list[list[str]]:
    """Table rows, with each contestant's time over ours."""
    fast = next(result.seconds for result in results if result.name == "ours")
    return [
        [
            str(result.size),
            result.name,
            f"{result.seconds:.3g}" + (" *" if result.timed < result.size.targets else ""),
            str(result.timed),
            f"{result.error:.1e}",
            f"{result.seconds / fast:.3g}",
        ]
        for result in results
    ]


def draw_growth(limits: dict[str, int], repeats: int, file: Path) -> None:
    """Seconds against rows, columns and right-hand sides, other things equal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ("ours", "HiGHS dual", "IRLS")
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for panel, (what, sizes) in zip(panels, GROWTH.items(), strict=True):
        field = {"rows": "rows", "columns": "columns"}.get(what, "targets")
        ticks = [getattr(size, field) for size in sizes]
        found = [measure(size, names, limits, repeats) for size in sizes]
        for index, name in enumerate(names):
            panel.loglog(
                ticks,
                [results[index].seconds for results in found],
                marker="o",
                label=name,
            )
        others = [f"{getattr(sizes[0], key)} {key}" for key in ("rows", "columns", "targets")]
        others = [text for text in others if not text.endswith(field)]
        panel.set(xlabel=what, title=", ".join(others).replace("targets", "right-hand sides"))
        panel.minorticks_off()
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("CPU seconds, one thread")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.l1", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--full", action="store_true", help="every right-hand side, big sizes")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, default 3")
    parser.add_argument("--figure", type=Path, help="PNG to draw growth to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    limits = {} if options.full else SLOW_COLUMNS
    rows: list[list[str]] = []
    for size in TABLE:
        rows += rows_of(measure(size, list(CONTESTANTS), limits, options.repeats))
    for size in FULL if options.full else ():
        rows += rows_of(measure(size, ["ours"], {}, options.repeats))
    for key, value in conditions().items():
        print(f"{key}: {value}")
    heads = ["p x n, r, eps", "", "CPU seconds", "r timed", "worst relative error", "/ ours"]
    print(tabulate(rows, heads, disable_numparse=True))
    scaled = "" if options.full else "; * timed on fewer right-hand sides and scaled linearly"
    print(f"medians of {options.repeats} rounds, in turn{scaled}")
    if options.figure:
        draw_growth(limits, options.repeats, options.figure)
        print(f"growth: {options.figure}")


if __name__ == "__main__":
    main()
