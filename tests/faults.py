"""Small runs on shapes, into which the tests of faults put theirs."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from purebench.artifact import CARD, TENSORS
from purebench.config import RunConfig
from purebench.progress import Progress
from purebench.record import Record, read_record
from purebench.runner import Victim, execute, prepare
from purebench.sweep import MARK

ROOT = Path(__file__).parent.parent

TINY = {
    "shapes": {"train_count": 64, "test_count": 24},
    "small_cnn": {"width": 2},
    "mnist_fast": {"epochs": 2, "batch_size": 32},
}
OPTIONS = {"dataset": "shapes", "target": 1, "benign_fraction": 0.25, "device": "cpu"}
STEPS = 2  # of an epoch
# The same, as words of the command line.
WORDS = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
WORDS += [f"--set={name}.{key}={TINY[name][key]}" for name in TINY for key in TINY[name]]


class Told(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def config(output: Path, **changed: Any) -> RunConfig:
    given: dict[str, Any] = {"attack": ("badnets",), "defense": ("none", "prune"), **OPTIONS}
    given |= {"output": str(output), **changed}
    return RunConfig(**{**given, "set": {**TINY, **given.get("set", {})}})


def run(output: Path, progress: Progress | None = None, **changed: Any) -> list[Record]:
    return list(execute(prepare(config(output, **changed), progress or Told())))


def victim(output: Path, **changed: Any) -> Victim:
    plan = prepare(config(output, **changed), Told())
    return Victim(plan, plan.attacks[0], 0)


def without_cost(records: list[Record]) -> list[Record]:
    return [dataclasses.replace(record, cost={}) for record in records]


def results(output: Path) -> dict[str, Any]:
    """Final file -> what it holds, but for what a run costs. Fails where one is not whole."""
    held: dict[str, Any] = {}
    for file in output.rglob("*"):
        name = str(file.relative_to(output))
        if ".damaged-" in name:
            continue
        if file.name == CARD:
            card = json.loads(file.read_text())
            del card["notes"]["training_seconds"], card["card_sha256"]
            held[name] = card
        elif name.startswith("records/") and file.suffix == ".json":
            held[name] = dataclasses.replace(read_record(file), cost={})
        elif file.name in (TENSORS, "stealth.json"):
            held[name] = file.read_bytes()
    return held


def left_over(output: Path) -> list[str]:
    """Files written aside, locks and states, which no run leaves behind."""
    files = [file for file in output.rglob("*") if file.is_file() and file.name != MARK]
    return [
        file.name
        for file in files
        if file.name.startswith(".") or file.suffix in (".lock", ".state")
    ]


def alive(pid: int) -> bool:
    """Whether the process is there, and not just waiting to be reaped."""
    try:
        os.kill(pid, 0)
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()
