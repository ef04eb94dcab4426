"""Unlikely: the loss of a class that must not be predicted.

Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020, arXiv:1908.04319,
have the term.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unlikely(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p(label)) of each row of ``logits`` (N, K); finite wherever the logits are."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.logsumexp(1) - others.logsumexp(1)
