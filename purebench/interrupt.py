"""Interrupt: Ctrl-C once ends the work after its epoch or cell, twice ends it now."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread
from types import FrameType

_TOLD = b"\ninterrupted: ending after this epoch or cell; Ctrl-C again ends it now\n"
_asked = False


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first Ctrl-C is told, and raised by the next ``check``; another one raises
    KeyboardInterrupt where it comes. Nothing is changed where Ctrl-C is ignored, or is somebody
    else's."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or current_thread() is not main_thread():
        yield
        return
    global _asked
    signal.signal(signal.SIGINT, _keep)
    try:
        yield
        check()
    finally:
        _asked = False
        signal.signal(signal.SIGINT, signal.default_int_handler)


def asked() -> bool:
    """Whether there was a Ctrl-C that is kept."""
    return _asked


def check() -> None:
    """Raise KeyboardInterrupt where one is kept."""
    if _asked:
        raise KeyboardInterrupt


def _keep(_: int, __: FrameType | None) -> None:
    global _asked
    if _asked:
        raise KeyboardInterrupt
    _asked = True
    if multiprocessing.parent_process() is None:
        with suppress(OSError):
            os.write(2, _TOLD)  # past sys.stderr, which this may have interrupted
