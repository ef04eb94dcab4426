"""Terminal: how much room there is for tables."""

from __future__ import annotations

import shutil
import sys


def width() -> int | None:
    """Characters in a line; None where the output goes to a file or a pipe, which have room."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
