"""ANP with an oracle: ANP whose threshold is chosen by test accuracy and test attack success, a
leak.

As toolboxes report ANP (BackdoorBench's row in Wu et al., NeurIPS 2022, arXiv:2206.12654, among
them): every threshold is tried on the test split and on triggered test images, and the one with the
lowest attack success rate is kept, of those that cost at most a tenth of the accuracy. No defender
could; the row shows what that knowledge is worth. See ``anp`` for the method and its settings.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from purebench import DEFENSES, Defense, DefenseContext, NotApplicable

from ._masks import THRESHOLDS, below, prune
from .anp import ANP


@DEFENSES.register("anp_oracle")
@dataclass(frozen=True)
class ANPOracle(Defense):
    """eps, ascents, alpha, steps, batch_size, lr: see ``anp``.

    tolerance: share of the undefended accuracy that may be lost, 0 to 1.
    """

    paper: ClassVar[str] = "BackdoorBench, arXiv:2206.12654 (leaks the test split)"
    needs: ClassVar[frozenset[str]] = frozenset({"oracle"})
    default: ClassVar[bool] = False
    eps: float = 0.4
    ascents: int = 1
    alpha: float = 0.2
    steps: int = 400
    batch_size: int = 128
    lr: float = 0.2
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        self._method()
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance must lie from 0 to 1, got {self.tolerance}")

    def _method(self) -> ANP:
        return ANP(self.eps, self.ascents, self.alpha, self.steps, self.batch_size, self.lr)

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        if ctx.oracle is None:
            raise NotApplicable("the oracle, which judges on the test split, is not given")
        masks = self._method().learn_masks(model, ctx.benign, ctx)
        least = (1 - self.tolerance) * ctx.oracle(model).acc
        lowest, best, chosen = float("inf"), model, None
        ctx.notes["pruned"] = {name: [] for name in masks}
        last = -1
        for threshold in THRESHOLDS:
            found = below(masks, threshold)
            count = sum(map(len, found.values()))
            if count == last:
                continue
            last = count
            candidate = copy.deepcopy(model)
            pruned = prune(candidate, found)
            scores = ctx.oracle(candidate)
            if scores.acc >= least and scores.asr < lowest:
                lowest, best, chosen = scores.asr, candidate, threshold
                ctx.notes["pruned"] = pruned
        ctx.notes.update(threshold=chosen, threshold_from="test ASR and ACC")
        return best
