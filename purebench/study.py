"""Study: how far sparse errors in a trained one-hidden-layer network can be undone, measured.

Networks are trained, some of their weights are overwritten with noise, and L1 regression on the
training inputs is to bring them back: Lu, Huang, Wang, "Purification of Contaminated Convolutional
Neural Networks via Robust Recovery: An Approach with Theoretical Guarantee in One-Hidden-Layer
Case", arXiv:2407.11031. A cell of the grid is a share ``eps`` of weights hit and a ratio of
regression variables to weights; its value is the share of vectors that come back exactly. Around
the grid stand claims of the theory, each with what was measured and whether that bears it out:
also those of failure, which are training of the output layer along with the filters, and Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from .data import LoadContext, Source
from .progress import Progress
from .recovery.exact import (
    NOISES,
    TwoStage,
    accuracy,
    contaminate,
    filter_design,
    image_patches,
    recover_output,
    recover_weights,
    span_residual,
    train_two_stage,
)
from .registry import DATASETS
from .seeding import generator

Data = Literal["synthetic", "mnist"]
Part = Literal["filters", "output"]

EXACT = 1e-6  # relative error below which a vector counts as recovered exactly
DECAY = 0.05  # strong enough to take a sixth of the initial weights away
LAWS = ("gaussian", *(name for name in NOISES if name != "gaussian"), "dropout")


@dataclass(frozen=True)
class Grid:
    """What is measured.

    ratios: n m / k, patches of all training images over entries of a filter.
    eps: shares of contaminated weights.
    laws: of the noise, over the whole grid; the others are tried at ``ratio`` alone.
    ratio: where laws are compared and where claims are tested.
    seeds: one network each. filters: recovered of each network; the output layer has ten vectors.
    length, patches, width: k, m and p of the synthetic networks.
    mnist: also on digits, whole images as patches (k = p = 784, m = 1).
    """

    ratios: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    eps: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    laws: tuple[str, ...] = ("gaussian",)
    ratio: float = 0.1
    seeds: tuple[int, ...] = (0, 1)
    filters: int = 24
    length: int = 400
    patches: int = 2
    width: int = 400
    mnist: bool = True


QUICK = Grid()
FULL = Grid(
    ratios=(0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4),
    eps=tuple(step / 20 for step in range(1, 17)),
    laws=LAWS,
    seeds=(0, 1, 2),
    filters=64,
)


class Cell(NamedTuple):
    """One point of the grid, over all seeds.

    ratio: design columns over entries: n m / k for filters, n / p for the output layer.
    vector_count: vectors recovered, with relative errors of which ``median`` and ``worst`` are
    told; exact_share: of them, below ``EXACT``. believed_share: held right without the truth.
    """

    part: Part
    data: Data
    law: str
    ratio: float
    eps: float
    vector_count: int
    exact_share: float
    believed_share: float
    median: float
    worst: float


class Claim(NamedTuple):
    """A statement, what was measured, and whether that bears it out."""

    text: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Study:
    grid: Grid
    cells: tuple[Cell, ...]
    claims: tuple[Claim, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "exact_below": EXACT,
            "grid": asdict(self.grid),
            "claims": [claim._asdict() for claim in self.claims],
            "cells": [cell._asdict() for cell in self.cells],
        }


class Network(NamedTuple):
    """A trained network and the patches (n, m, k) it was trained on."""

    net: TwoStage
    patches: Tensor


class Errors(NamedTuple):
    """Relative errors of recovered vectors, and which are believed to be right."""

    errors: Tensor
    believed: Tensor


def run(grid: Grid, progress: Progress) -> Study:
    """Measure the grid and test the claims; a step of the bar is a cell."""
    datas: tuple[Data, ...] = ("synthetic", "mnist") if grid.mnist else ("synthetic",)
    others = tuple(law for law in LAWS if law not in grid.laws)
    plans: list[tuple[Data, float, Sequence[str]]] = []
    for data in datas:
        for ratio in sorted({*grid.ratios, grid.ratio}):
            on_grid = grid.laws if ratio in grid.ratios else ()
            plans.append((data, ratio, (*on_grid, *(others if ratio == grid.ratio else ()))))
    total = sum(2 * len(laws) * len(grid.eps) for _, _, laws in plans)
    make = _trainer(grid)
    cells = []
    with progress.bar("recovering", total, "cell") as bar:
        for data, ratio, laws in plans:
            networks = [(seed, make(data, ratio, seed)) for seed in grid.seeds]
            for law in laws:
                for eps in grid.eps:
                    filters = [_filters(grid, at, law, eps, seed) for seed, at in networks]
                    output = [_output(at, at.net.weight, law, eps, seed) for seed, at in networks]
                    columns, length = filter_design(networks[0][1].patches).T.shape
                    n_over_p = len(networks[0][1].patches) / len(networks[0][1].net.weight)
                    for part, found, x in (
                        ("filters", filters, columns / length),
                        ("output", output, n_over_p),
                    ):
                        cells.append(_cell(part, data, law, x, eps, found))  # type: ignore[arg-type]
                        bar.step(exact=cells[-1].exact_share)
    claims = _claims(grid, cells, make, progress)
    return Study(grid, tuple(cells), claims)


def table(study: Study) -> str:
    """Percent of vectors recovered exactly, a line a ratio or law, and the claims."""
    blocks = []
    for panel in panels(study):
        rows = [[name, *values] for name, values in zip(panel.rows, panel.values, strict=True)]
        head = [panel.axis, *panel.columns]
        body = tabulate(rows, head, "simple", floatfmt=".0%", disable_numparse=[0])
        blocks.append(f"{panel.title}, share recovered exactly by eps\n\n{body}")
    lines = [
        f"  [{'yes' if claim.holds else ' no'}] {claim.text}\n        {claim.measured}"
        for claim in study.claims
    ]
    return "\n\n".join([*blocks, "\n".join(["claims, each tested in this run", "", *lines])])


class Panel(NamedTuple):
    """A heat map: values[row][column] in [0, 1]."""

    title: str
    axis: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


def panels(study: Study, law: str = "gaussian") -> list[Panel]:
    """Of one law over the ratios, and of all laws at one ratio; for each part and data."""
    found = []
    parts: tuple[tuple[Part, str, str], ...] = (
        ("filters", "filters", "n m / k"),
        ("output", "output layer", "n / p"),
    )
    for part, name, axis in parts:
        for data in ("synthetic", "mnist"):
            mine = [cell for cell in study.cells if (cell.part, cell.data) == (part, data)]
            if not mine:
                continue
            where = {"synthetic": "synthetic", "mnist": "MNIST"}[data]
            of_law = [cell for cell in mine if cell.law == law]
            found.append(_panel(f"{name}, {where}, {law} noise", axis, of_law, "ratio"))
            if data == "synthetic":
                laws = {cell.law: 0 for cell in mine}
                at = {cell.ratio for cell in mine if cell.law not in study.grid.laws} or {
                    min((cell.ratio for cell in mine), key=lambda x: abs(x - study.grid.ratio))
                }
                of_ratio = [cell for cell in mine if cell.ratio in at]
                title = f"{name}, {where}, {axis} = {max(at):.3g}"
                if len(laws) > 1:
                    found.append(_panel(title, "noise", of_ratio, "law"))
    return found
