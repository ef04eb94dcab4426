"""L1: least-absolute-deviations regression for many right-hand sides at once, proved optimal.

min_U ||B - A U||_1 is the core of robust recovery (Lu, Huang and Wang, arXiv:2407.11031, after
Gao and Lafferty, arXiv:2005.09912): gross errors in a few entries of B leave the minimiser where
it was. Solved by Douglas-Rachford splitting (Eckstein and Bertsekas 1992; over-relaxed ADMM by
another name) on an orthonormal basis of A, so that an iteration is two matrix products for all
columns together, and finished by a linear solve on rows that look free of error. Ours departs in
two ways. Each column's penalty follows the residual of its better-fitting rows, and so tells ever
smaller errors apart. And nothing is believed of a finish but its dual certificate: a y with
|y| <= 1 and A^T y = 0 has b.y <= ||b - A v||_1 for every v, so b.y = ||b - A u||_1 proves that u
is a minimiser, however u and y were come by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RELAXATION = 1.7
SINGLE = 100  # iterations in float32, enough to tell most sparse errors; the rest are in float64
LOOK, LATER = 10, 50  # iterations between looks at the columns, up to the 100th and after it
CALMING = 100  # iterations after which penalties change ever less, or some columns never settle
SAMPLE = 256  # rows that a penalty is measured on
BATCH = 32  # columns that try to finish together; more try while half of them do


@dataclass(frozen=True, eq=False)
class L1Fit:
    """A regression of r right-hand sides on n variables.

    coefficients (n, r), of least Euclidean norm where A is rank-deficient.
    objective (r,): sum over the rows of |B - A U|, or of its Huber function.
    gap (r,): objective less a proved lower bound of the minimum.
    status, a word a column: ``exact``, optimal up to rounding, by a dual certificate; ``gap``,
    within ``tolerance`` of optimal, by one; ``unconverged``, neither: the last iterate.
    fitted (p, r): whether U reproduces an entry up to rounding, in rows that depend on U at all.
    rank: of A. Any vertex fits ``rank`` rows; many more are no accident.
    """

    coefficients: Tensor
    objective: Tensor
    gap: Tensor
    status: tuple[str, ...]
    fitted: Tensor
    rank: int


def l1_regress(
    A: Tensor,
    B: Tensor,
    *,
    delta: float = 0.0,
    iterations: int = 2000,
    finish: bool = True,
    tolerance: float | None = None,
    rounding: float | None = None,
) -> L1Fit:
    """U (n, r) minimising ||B - A U||_1, column by column, for A (p, n) and B (p, r).

    A, B: both float32 or both float64, finite, on one device; A of any shape and rank.
    delta: 0 for L1; above 0 for the Huber loss, e^2 / (2 delta) up to |e| = delta and
    |e| - delta / 2 beyond.
    iterations: at most so many; without ``finish`` exactly so many, which is for data that no
    sparse errors explain (float32 and a few hundred serve there).
    tolerance: gap, as a share of the objective, that ends a column; default 1e-7 (float32: 1e-4).
    rounding: noise in B, as a share of its size, that counts as no error; default 2**6 machine
    epsilons. Give 1e-6 for float64 copies of float32 numbers.

    ``exact`` speaks of the minimiser, not of the truth behind B. Where errors are few enough the
    two agree, and the coefficients then are those of least squares on rows without error; the
    sign of it is that more rows than ``rank`` are ``fitted``.
    ValueError: shapes, types, devices or settings that do not fit, values that are not finite.
    """
    _check(A, B, delta, iterations)
    epsilon = torch.finfo(A.dtype).eps
    single = A.dtype == torch.float32
    tolerance = (1e-4 if single else 1e-7) if tolerance is None else tolerance
    rounding = 2**6 * epsilon if rounding is None else rounding

    # float64 from here on, most iterations excepted: what decides must not be rounding.
    relative = max(A.shape) * epsilon
    Q, back = _orthonormal(A.double(), relative)
    b = B.double()
    live = Q.square().sum(1) > relative**2  # other rows have the same residual for every U
    problem = _Problem(Q[live], b[live], delta, rounding)
    u = problem.Q.T @ problem.b
    gap = _loss(problem.b - problem.Q @ u, delta).sum(0)  # 0 being a lower bound
    exact = problem.rounded(gap)
    left = (~exact).nonzero()[:, 0]
    if len(left):
        u[:, left], gap[left], exact[left] = _iterate(
            problem.columns(left), iterations, finish, tolerance, single
        )

    U, fit = back @ u, problem.Q @ u
    objective = _loss(b - A.double() @ U, delta).sum(0)
    close = gap <= tolerance * objective
    status = torch.where(exact, 0, torch.where(close, 1, 2)).tolist()
    fitted = live[:, None].expand_as(b).clone()
    if live.any():
        fitted[live] = (problem.b - fit).abs() <= rounding * fit.abs().amax(0)
    return L1Fit(
        coefficients=U.to(A.dtype),
        objective=objective.to(A.dtype),
        gap=gap.to(A.dtype),
        status=tuple(("exact", "gap", "unconverged")[word] for word in status),
        fitted=fitted,
        rank=Q.shape[1],
    )


def _check(A: Tensor, B: Tensor, delta: float, iterations: int) -> None:
    if A.ndim != 2 or B.ndim != 2 or len(A) != len(B):
        raise ValueError(
            f"expected A (p, n) and B (p, r), got {tuple(A.shape)} and {tuple(B.shape)}; "
            "right-hand sides are columns"
        )
    if A.dtype not in (torch.float32, torch.float64) or B.dtype != A.dtype or A.device != B.device:
        raise ValueError(
            "expected A and B both float32 or both float64 on one device, got "
            f"{A.dtype} on {A.device} and {B.dtype} on {B.device}"
        )
    for name, given in (("A", A), ("B", B)):
        if not given.isfinite().all():
            raise ValueError(
                f"{name} holds values that are not finite; remove those rows or columns"
            )
    if not delta >= 0 or iterations < 1:
        raise ValueError(f"expected delta >= 0 and iterations >= 1, got {delta} and {iterations}")


def _orthonormal(A: Tensor, relative: float) -> tuple[Tensor, Tensor]:
    """Q (p, k) with orthonormal columns spanning those of A, and M with A M = Q; k the rank."""
    Q, R = torch.linalg.qr(A)
    left, values, right = torch.linalg.svd(R, full_matrices=False)
    kept = values > relative * values.amax() if len(values) else values > 0
    return Q @ left[:, kept], right.T[:, kept] / values[kept]


@dataclass(frozen=True, eq=False)
class _Problem:
    """min_u loss(b - Q u) for Q (p, n) with orthonormal columns and b (p, r)."""

    Q: Tensor
    b: Tensor
    delta: float
    rounding: float

    def columns(self, which: Tensor) -> _Problem:
        return _Problem(self.Q, self.b[:, which], self.delta, self.rounding)

    def rounded(self, gap: Tensor) -> Tensor:
        """Whether a gap (r,) is explained by rounding of b."""
        return gap <= self.rounding * self.b.abs().sum(0)

    def gap(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The objective (r,) at u (n, r), and its excess over the bound that y (p, r) proves.

        Any y will do: it is first moved and scaled to Q^T y = 0 and |y| <= 1. Then each term of
        the excess, |e| - y e in L1, is at least 0 (Fenchel and Young).
        """
        y = y - self.Q @ (self.Q.T @ y)
        y = y / y.abs().amax(0).clamp_min(1)
        e = self.b - self.Q @ u
        loss = _loss(e, self.delta)
        return loss.sum(0), (loss - y * e + self.delta / 2 * y.square()).sum(0)

    def finish(self, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (n, r) fitting those of ``rows`` (m, r) where |y| < 1, its gap, and if it is exact."""
        Q, b, delta = self.Q, self.b, self.delta
        inside = torch.zeros_like(y).scatter_(0, rows, (y.abs() < 1).to(y).gather(0, rows))
        outside = delta * (1 - inside) * y
        part = Q[rows.T] * inside.gather(0, rows).T.unsqueeze(2)
        factor = torch.linalg.cholesky_ex(part.mT @ part)[0]

        def solve(x: Tensor) -> Tensor:
            return torch.cholesky_solve((Q.T @ x).T.unsqueeze(2), factor)[..., 0].T

        u = solve(inside * b + outside)
        u = u + solve(inside * (b - Q @ u) + outside)  # a Gram matrix squares the condition
        fit = Q @ u
        e = b - fit
        if delta:
            gap = self.gap(u, (e / delta).clamp(-1, 1))[1]
            return u, gap, self.rounded(gap)
        noise = self.rounding * fit.abs().amax(0)
        y = torch.where(e.abs() > noise, e.sign(), y)
        gap = self.gap(u, y - inside * (Q @ solve(y)))[1]
        return u, gap, self.rounded(gap) & ((inside * e).abs() <= noise).all(0)


def _iterate(
    problem: _Problem, iterations: int, finish: bool, tolerance: float, single: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """u (n, r), its gap (r,) and whether it is exact.

    In units of a penalty t a column, s = r + y holds a residual r and its dual y = clamp(s).
    """
    Q, delta = problem.Q, problem.delta
    p, n = Q.shape
    at = torch.arange(problem.b.shape[1], device=Q.device)  # columns still at work
    u, gap, exact = Q.new_zeros(n, len(at)), Q.new_zeros(len(at)), torch.zeros_like(at).bool()
    d = problem.b - Q @ (Q.T @ problem.b)
    sample = slice(None, None, 1 + p // SAMPLE)
    P, t = Q.float(), _penalty(d[sample], n / p)
    target, shrink = (d / t).float(), (t / (t + delta)).float()
    s = target.clone()

    for step in range(1, iterations + 1):
        y = _dual(s, shrink, delta)
        s.lerp_(torch.addmm(target, P, P.T @ torch.add(s, y, alpha=-2)).add_(y), RELAXATION)
        last = step == iterations
        if not last and step % (LOOK if step <= SINGLE else LATER):
            continue

        y = _dual(s, shrink, delta)
        r = s - y
        w = P.T @ r
        done = torch.zeros_like(at).bool()
        if finish:
            # Rows with the smallest duals are the likeliest to be clean; now and then take all,
            # for data in which few rows see some direction, and for Huber, which needs them all.
            zeros = (y.abs() < 1).sum(0)
            every = last or step % LATER == 0 or delta > 0
            m = min(max(n, int(zeros.max())), p if every else n + max(8, n // 2))
            size, rows = y.abs().topk(m, 0, largest=False)
            order = size[-1].argsort()
            for some in order[zeros[order] >= n].split(BATCH):
                v, slack, good = problem.columns(some).finish(y[:, some].double(), rows[:, some])
                hit = at[some[good]]
                u[:, hit], gap[hit], exact[hit] = v[:, good], slack[good], True
                done[some[good]] = True
                if 2 * len(hit) < len(some) and not last:
                    break
        if last or (finish and step % LATER == 0):
            v = Q.T @ problem.b - t * w
            objective, slack = problem.gap(v, y.double())
            good = ~done if last else ~done & (slack <= tolerance * objective)
            u[:, at[good]], gap[at[good]] = v[:, good], slack[good]
            done |= good
        if last or done.all():
            break

        stay = ~done
        limit = 2.0 if step < SINGLE else 32.0
        change = _penalty(target[sample] + P[sample] @ w, n / p).clamp_(1 / limit, limit)[stay]
        change **= min(1.0, CALMING / step)
        at, problem, d, t = at[stay], problem.columns(stay), d[:, stay], t[stay] * change
        P = Q if step >= SINGLE and not single else P
        s = (r[:, stay] / change + y[:, stay]).to(P)
        target, shrink = (d / t).to(P), (t / (t + delta)).to(P)
    return u, gap, exact


def _dual(s: Tensor, shrink: Tensor, delta: float) -> Tensor:
    return (s * shrink).clamp_(-1, 1) if delta else s.clamp(-1, 1)


def _penalty(e: Tensor, share: float) -> Tensor:
    """Twice a quantile (r,) of |e| (p, r): a quarter of the way up the rows no vertex need fit.

    share: of the rows, those that any vertex fits, n / p.
    """
    rank = max(1, round(len(e) * (share + (1 - share) / 4)))
    sizes = e.abs().T.contiguous().kthvalue(rank).values
    return 2 * sizes.clamp_min(torch.finfo(torch.float32).tiny)


def _loss(e: Tensor, delta: float) -> Tensor:
    if not delta:
        return e.abs()
    return torch.where(e.abs() < delta, e.square() / (2 * delta), e.abs() - delta / 2)
