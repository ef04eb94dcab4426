"""Checks of a user's own data: what cannot be used is named, all of it in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from purebench import UsageError

SHOWN = 20


def listing(items: Sequence[str]) -> str:
    """'a, b, c' of at most 20 items, then 'and 5 more'; unprintable characters become '?'."""
    shown = ", ".join(items[:SHOWN])
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "".join(letter if letter.isprintable() else "?" for letter in shown) + more


def given(path: str | None, where: str, what: str) -> Path:
    """The user's path. UsageError where none was given or nothing is there."""
    if not path:
        raise UsageError(f"{where} needs to know where your data is: --set {where}.path={what}")
    place = Path(path).expanduser()
    if not place.exists():
        raise UsageError(f"{where}.path {path}: no such file or folder")
    return place


def check_labels(labels: NDArray[np.integer], num_classes: int, where: str) -> None:
    """UsageError where a label lies outside 0..num_classes-1: which values, how often, first where.

    Args:
        labels: (N,), any integer type.
        where: what the user calls the labels, for the message.
    """
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        values, counts = np.unique(labels[wrong], return_counts=True)
        told = [f"{value} ({count})" for value, count in zip(values, counts, strict=True)]
        raise UsageError(
            f"{where}: {wrong.sum()} labels outside 0..{num_classes - 1}: {listing(told)}; "
            f"the first at index {wrong.argmax()}"
        )
