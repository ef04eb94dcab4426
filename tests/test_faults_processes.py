"""Workers that die or hang, Ctrl-C once and twice, and terminals that are not as usual."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from purebench import training
from purebench.cli import FAILED, INTERRUPTED, OK, USAGE, main
from purebench.executors import pool
from purebench.interrupt import deferred
from purebench.record import read_record

from .faults import ROOT, STEPS, TINY, WORDS, alive, left_over, results

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="of Unix")

PLUGIN = '''\
"""A defense that acts."""

import ctypes, os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from purebench import DEFENSES, Defense, DefenseContext
from purebench.interrupt import asked

HERE = Path(__file__).parent


def child():
    """A process that this one does not end."""
    started = subprocess.Popen(["sleep", "3600"])
    (HERE / "aside").write_text(f"{os.getpid()} {started.pid}")
    (HERE / "aside").rename(HERE / "pids")


def until(what):
    while not what():
        time.sleep(0.02)


@DEFENSES.register("acts")
@dataclass(frozen=True)
class Acts(Defense):
    paper: ClassVar[str] = "nobody"

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        BODY
        return model
'''


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C is Python's own, though who started the tests may ignore it, and so it is after."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    found = signal.signal(signal.SIGINT, before)
    assert found is signal.default_int_handler


Sweep = Callable[..., int]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """``bench.py sweep`` in an empty folder, of defenses of which one acts; its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "TRIES", 1)

    def sweep(body: str, *words: str) -> int:
        (tmp_path / "acts.py").write_text(PLUGIN.replace("BODY", body))
        text = "dataset: shapes\nattack: none\ntarget: 1\nbenign_fraction: 0.25\n"
        (tmp_path / "sweep.yaml").write_text(text + f"set: {json.dumps(TINY)}\n")
        given = ["--plugin", "acts.py", "--defense", "none", "acts", "prune"]
        return main(["sweep", "sweep.yaml", *given, *words])

    return sweep


def statuses(folder: Path) -> dict[str, str]:
    found = (read_record(file) for file in folder.rglob("records/*/*.json"))
    return {record.cell.defense["name"]: record.error or record.status for record in found}


def ended(folder: Path) -> bool:
    """Whether the worker and its child are gone; a killed process takes a moment."""
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == 2
    for _ in range(500):
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


# --- workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("ctypes.string_at(0)", -signal.SIGSEGV),
    ],
    ids=["killed", "segfault"],
)
def test_a_worker_that_is_killed_costs_its_cell_alone(
    body: str, code: int, sweep: Sweep, tmp_path: Path
) -> None:
    assert sweep(f"child(); {body}", "--jobs", "2") == FAILED
    assert statuses(tmp_path) == {
        "none": "ok",
        "acts": f"the worker died with exit code {code}, 1 times",
        "prune": "ok",
    }
    assert ended(tmp_path)
    assert not left_over(tmp_path / "results")
    assert sweep("pass") == OK  # a failed cell is tried again
    assert set(statuses(tmp_path).values()) == {"ok"}


def test_a_cell_that_hangs_is_ended_with_all_that_it_started(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock leaps while it hangs, so that nobody waits for it."""
    steady, leaps = time.monotonic, [0.0]
    pids = tmp_path / "pids"

    def leaping() -> float:
        if pids.exists() and alive(int(pids.read_text().split()[0])):
            leaps[0] += 400
        return steady() + leaps[0]

    monkeypatch.setattr(time, "monotonic", leaping)
    assert sweep("child(); until(lambda: False)", "--timeout", "1000") == FAILED
    told = "it took longer than 1000 s"
    assert statuses(tmp_path) == {"none": "ok", "acts": told, "prune": "ok"}
    assert ended(tmp_path)


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan"])
def test_a_timeout_is_a_time(given: str, sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("pass", f"--timeout={given}") == USAGE
    assert re.fullmatch(r"error: --timeout must be [^\n]*\n", capsys.readouterr().err)


ORPHANED = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from purebench.worker import start
from loiters import loiter

if __name__ == "__main__":
    start(loiter, sys.argv[1])
    while not os.path.exists(sys.argv[1] + "/pids"):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
"""

LOITERS = """
import os, subprocess, time
from purebench.worker import lead

def loiter(folder):
    lead()
    child = subprocess.Popen(["sleep", "3600"])
    with open(folder + "/aside", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(folder + "/aside", folder + "/pids")
    time.sleep(3600)
"""


def test_workers_end_with_a_starter_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "loiters.py").write_text(LOITERS)
    (tmp_path / "starts.py").write_text(ORPHANED)
    words = [sys.executable, "starts.py", str(tmp_path)]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(words, cwd=tmp_path, env=path, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert ended(tmp_path)


# --- Ctrl-C -------------------------------------------------------------------------------------


def interrupting(monkeypatch: pytest.MonkeyPatch, *steps: int) -> Callable[[], int]:
    """Ctrl-C at these steps of the coming training; what is given back counts steps."""
    original = training.batch
    taken = []

    def batch(*given: Any) -> Any:
        taken.append(1)
        if len(taken) in steps:
            signal.raise_signal(signal.SIGINT)
        return original(*given)

    monkeypatch.setattr(training, "batch", batch)
    return lambda: len(taken)


@pytest.mark.parametrize(
    ("steps", "taken", "states"),
    [
        ((1,), STEPS, 1),  # once: to the end of the epoch, which is kept
        ((1, 2), 2, 0),  # twice: now
        ((STEPS + 1, STEPS + 2), STEPS + 2, 1),  # now, in the second epoch
    ],
)
def test_control_c_once_ends_after_the_epoch_and_twice_now(
    steps: tuple[int, ...],
    taken: int,
    states: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [*WORDS, "--attack", "badnets", "--defense", "none", "prune", "--output"]
    with monkeypatch.context() as patch:
        count = interrupting(patch, *steps)
        assert main([*words, str(tmp_path / "stopped")]) == INTERRUPTED == 130
        assert count() == taken
    told = capfd.readouterr().err
    assert "Ctrl-C again ends it now" in told
    assert "Traceback" not in told
    assert len(list(tmp_path.rglob("*.state"))) == states
    assert results(tmp_path / "stopped") == {}
    count = interrupting(monkeypatch)
    assert main([*words, str(tmp_path / "stopped")]) == OK
    assert count() == STEPS * (2 - states)
    assert main([*words, str(tmp_path / "plain")]) == OK
    assert results(tmp_path / "stopped") == results(tmp_path / "plain")
    assert not left_over(tmp_path)


def test_control_c_between_cells(sweep: Sweep, tmp_path: Path) -> None:
    """The cell that it comes in is finished."""
    assert sweep("signal.raise_signal(signal.SIGINT)") == INTERRUPTED
    assert statuses(tmp_path) == {"none": "ok", "acts": "ok"}
    assert sweep("sys.exit('run again')") == OK
    assert statuses(tmp_path) == {"none": "ok", "acts": "ok", "prune": "ok"}


def test_control_c_reaches_workers(sweep: Sweep, tmp_path: Path) -> None:
    """Once: each finishes its cell."""
    act = "child(); os.kill(os.getppid(), signal.SIGINT); until(asked)"
    assert sweep(act, "--jobs", "2") == INTERRUPTED
    assert statuses(tmp_path) == {"none": "ok", "acts": "ok"}
    assert ended(tmp_path)
    assert not left_over(tmp_path / "results")


def test_control_c_twice_ends_workers_now(sweep: Sweep, tmp_path: Path) -> None:
    act = "os.kill(os.getppid(), signal.SIGINT); "
    assert sweep(f"child(); {act} until(asked); {act} until(lambda: 0)", "--jobs", "2") == 130
    assert statuses(tmp_path) == {"none": "ok"}
    assert ended(tmp_path)


def test_an_ignored_control_c_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# --- where the output goes ----------------------------------------------------------------------


def shell(line: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("bench", f"{sys.executable} bench.py")
    return subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    done = shell(f"bench --version {closed}")
    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout.startswith("purebench ") == (closed == "2>&-")
    refused = shell(f"bench nothing {closed}")
    assert (refused.returncode, refused.stdout) == (USAGE, "")
    assert refused.stderr.startswith("error: unknown command") == (closed == ">&-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_output_that_cannot_be_written() -> None:
    done = shell("bench list > /dev/full")
    assert done.returncode == FAILED
    assert done.stderr == "error: [Errno 28] No space left on device\n"


BAR = """
from purebench.progress import Progress

with Progress().bar("training a network", 20, "epoch") as bar:
    for _ in range(20):
        bar.step(loss=0.123456)
"""


def test_bars_fit_a_terminal_of_40_columns() -> None:
    fcntl = pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    bare = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    bare["TQDM_MININTERVAL"] = "0"
    command = [sys.executable, "-c", BAR]
    with subprocess.Popen(command, cwd=ROOT, env=bare, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        text = b""
        with suppress(OSError):  # Linux: nobody has the other end any more
            while part := os.read(ours, 65536):
                text += part
    os.close(ours)
    assert running.returncode == OK
    bars = [bar for bar in re.split(r"[\r\n]", text.decode()) if bar.startswith("training")]
    assert len(bars) >= 20
    assert max(map(len, bars)) <= 40


def test_without_a_terminal_each_step_is_a_line() -> None:
    command = [sys.executable, "-c", BAR]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "training a network: epoch 20/20  loss 0.1235"
    assert len(done.stderr.splitlines()) == 20


STARTING = """
import signal, sys
from purebench import worker

def work():
    sys.exit(signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, []))

if __name__ == "__main__":
    processes = [worker.start(work) for _ in range(2)]
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="of Unix")
def test_a_worker_that_starts_is_not_interrupted(tmp_path: Path) -> None:
    """The first one of a process neither, which starts multiprocessing's tracker."""
    file = tmp_path / "starting.py"
    file.write_text(STARTING)
    root = Path(__file__).parent.parent
    ended = subprocess.run(
        [sys.executable, file], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert ended.returncode == 0
