"""Hypergradient: the slope of an outer loss whose argument an inner minimisation has chosen.

With x*(w) minimising the inner loss g(x, w), a fixed point of the step F(x, w) = x - s dg/dx, the
slope of f(x*(w), w) is df/dw + (dF/dw)' v, where v = (I - dF/dx)'^-1 df/dx; see Grazzi,
Franceschi, Pontil, Salzo, "On the Iteration Complexity of Hypergradient Computation", ICML 2020,
arXiv:2006.16218.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def implicit(
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    chosen: Tensor,
    *,
    step: float,
    terms: int,
) -> Tensor:
    """A scalar whose slope, in the weights that ``outer`` and ``inner`` use, is the implicit one.

    Args:
        outer, inner: a point -> a loss, both at the present weights.
        chosen: where ``inner`` is smallest.
        step: s, small enough for I - s d2g/dx2 to contract.
        terms: of the Neumann series of the inverse, beyond the first.
    """
    point = chosen.detach().requires_grad_()
    loss = outer(point)
    (start,) = torch.autograd.grad(loss, point, retain_graph=True)
    (slope,) = torch.autograd.grad(inner(point), point, create_graph=True)
    stepped = point - step * slope
    total = start
    for _ in range(terms):
        (moved,) = torch.autograd.grad(stepped, point, total, retain_graph=True)
        total = start + moved
    return loss + (total * stepped).sum() - (total * stepped).sum().detach()
