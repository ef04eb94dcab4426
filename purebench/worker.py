"""Worker: a process that leads a group of its own, and ends with the one that started it.

So a Ctrl-C on the terminal reaches it through its starter alone, and what it has started itself
ends with it. On Windows, which has no groups, the process alone ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from threading import Thread
from typing import Any


def start(work: Callable[..., None], *given: Any) -> SpawnProcess:
    """Have ``work(*given)``, which begins with ``lead``, done by a worker."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=given)
    with _uninterrupted():
        process.start()
    return process


def lead() -> None:
    """Found the group; in the worker, before all else."""
    starter = multiprocessing.parent_process()
    assert starter is not None
    if sys.platform != "win32":
        os.setpgid(0, 0)
    Thread(target=_follow, args=[starter.sentinel], daemon=True).start()
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def interrupt(process: SpawnProcess) -> None:
    """As Ctrl-C does."""
    with suppress(ProcessLookupError):
        os.kill(_pid(process), signal.SIGINT)


def end(process: SpawnProcess) -> None:
    """Kill what is left of the worker and its group."""
    process.kill()
    if sys.platform != "win32":
        with suppress(ProcessLookupError):  # no group yet, or none any more
            os.killpg(_pid(process), signal.SIGKILL)
    process.join()


def _follow(starter: int) -> None:
    wait([starter])
    if sys.platform != "win32":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _pid(process: SpawnProcess) -> int:
    assert process.pid is not None
    return process.pid


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A process that is started inside gets no Ctrl-C before ``lead``."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # else it starts in between, and lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
