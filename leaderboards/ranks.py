"""Ranks: do defenses differ over attacks, and which of them?

Friedman's test, then Nemenyi's critical difference. Demsar, "Statistical Comparisons of
Classifiers over Multiple Data Sets", JMLR 7, 2006. A block is an attack, its rating the mean over
seeds: seeds of one attack resemble each other, and as blocks of their own would feign certainty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Ranking:
    """mean_ranks: defense -> mean rank over attacks, 1 the best; ties share their ranks.

    block_count: attacks. p_value: Friedman's; None for fewer than three defenses, or where all
        tie. critical_difference: mean ranks further apart differ at the level of 0.05.
    """

    mean_ranks: Mapping[str, float]
    block_count: int
    p_value: float | None
    critical_difference: float


def rank(ratings: Mapping[str, Sequence[float]]) -> Ranking | None:
    """Rank defenses by their ratings, one an attack, higher is better.

    None for fewer than two defenses or two attacks: there is nothing to compare.
    """
    count = len(ratings)
    blocks = np.array(list(ratings.values()), dtype=float).T
    if count < 2 or len(blocks) < 2:
        return None
    from scipy import stats  # two seconds to import: a single run's table need not wait for it

    # ratings are sums of shares: equal ones may differ in the last bit
    ranks = stats.rankdata(-blocks.round(12), axis=1)
    spread = stats.studentized_range.ppf(1 - SIGNIFICANCE, count, np.inf) / math.sqrt(2)
    p_value = None
    if count > 2 and (ranks != ranks[:, :1]).any():
        p_value = float(stats.friedmanchisquare(*ranks.T).pvalue)
    return Ranking(
        dict(zip(ratings, ranks.mean(axis=0).tolist(), strict=True)),
        len(blocks),
        p_value,
        float(spread * math.sqrt(count * (count + 1) / (6 * len(blocks)))),
    )
