"""Progress: a bar on a terminal, a line for each step elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm


class Bar(Protocol):
    """What a running piece of work reports to."""

    def step(self, count: int = 1, **facts: float | str) -> None:
        """``count`` more units are done; ``facts`` stand behind the bar."""


class Progress:
    """Where work in progress is shown (standard error, so that results can be piped).

    Args:
        quiet: show nothing.
        lines: without a terminal, print one line a step; otherwise such bars are silent.
        bars: show any bar at all.
    """

    def __init__(self, quiet: bool = False, lines: bool = True, bars: bool = True) -> None:
        self.quiet = quiet
        self.lines = lines
        self.bars = bars

    def say(self, text: str) -> None:
        """One line for the user, above any bar."""
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def without_lines(self) -> Progress:
        """The same, but silent where there is no terminal."""
        return Progress(self.quiet, lines=False, bars=self.bars)

    def without_bars(self) -> Progress:
        """The same, for work that is a step of a longer bar."""
        return Progress(self.quiet, self.lines, bars=False)

    @contextmanager
    def bar(self, label: str, total: int, unit: str = "step") -> Iterator[Bar]:
        """A bar of ``total`` units for the work inside."""
        if self.quiet or not self.bars:
            yield _Silent()
        elif sys.stderr.isatty():
            with tqdm(total=total, desc=label, unit=unit, leave=False, dynamic_ncols=True) as shown:
                yield _Terminal(shown)
        elif self.lines:
            yield _Lines(label, total, unit)
        else:
            yield _Silent()


class _Silent:
    def step(self, count: int = 1, **facts: float | str) -> None:
        pass


class _Terminal:
    def __init__(self, shown: tqdm[Any]) -> None:
        self.shown = shown

    def step(self, count: int = 1, **facts: float | str) -> None:
        self.shown.set_postfix(facts, refresh=False)
        self.shown.update(count)


class _Lines:
    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0

    def step(self, count: int = 1, **facts: float | str) -> None:
        self.done += count
        words = [f"{key} {_short(value)}" for key, value in facts.items()]
        text = f"{self.label}: {self.unit} {self.done}/{self.total}"
        print("  ".join([text, *words]), file=sys.stderr, flush=True)


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
