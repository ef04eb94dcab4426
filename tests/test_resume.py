"""A training that was killed goes on, and ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from purebench import (
    ATTACKS,
    AttackContext,
    DataBundle,
    NotApplicable,
    Recipe,
    Split,
    fit,
    interrupt,
    savepoint,
)
from purebench import runner as running
from purebench import training as engine
from purebench.config import RunConfig
from purebench.progress import Progress
from purebench.runner import Victim, prepare
from purebench.savepoint import Savepoints
from purebench.seeding import isolated
from purebench.training import augment, cross_entropy, sgd
from purebench.training import batch as make_batch

control: Any = import_module("purebench.attacks._control")
CPU = torch.device("cpu")
STEPS = 4  # of an epoch
SHORT = Recipe(epochs=4, batch_size=32, lr=0.05, nesterov=True, crop=2, flip=True)
KILLED_AT = (1, 2 * STEPS + 1, 4 * STEPS - 1)  # a step of the first, of a middle, of the last epoch
FROM_EPOCH = dict(zip(KILLED_AT, (0, 2, 3), strict=True))


class Killed(BaseException):
    """As an interrupt, it passes whatever catches errors."""


class Told(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def small(bundle: DataBundle) -> Split:
    return bundle.train[torch.arange(STEPS * SHORT.batch_size)]


def savepoints(folder: Path, identity: int = 0, progress: Progress | None = None) -> Savepoints:
    return Savepoints(folder, {"number": identity}, CPU, progress or Told())


def equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(value, second[name]) for name, value in first.items())


# --- fit ----------------------------------------------------------------------------------------


class Training:
    """A network with BatchNorm and dropout, by a loss that draws from every kind of generator."""

    def __init__(self, split: Split, adam: bool, seed: int) -> None:
        self.split, self.adam, self.seed = split, adam, seed
        self.steps = 0
        self.notes: dict[str, Any] = {}

    def __call__(self, kept: Savepoints | None, killed_at: int | None = None) -> nn.Module:
        """The trained network; ``steps`` and ``notes`` are those of this call."""
        self.steps, self.notes = 0, {}
        rng = torch.Generator().manual_seed(self.seed)

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            if self.steps == killed_at:
                raise Killed
            self.steps += 1
            noise = 0.1 * torch.rand(images.shape, generator=rng)
            weight = 1 + 0.1 * random.random() + 0.1 * float(np.random.randn())
            return weight * cross_entropy(model, images + noise, labels)

        def adam(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.Adam(weights, fused=True)

        with isolated(self.seed):
            model = nn.Sequential(
                nn.Conv2d(1, 4, 3, bias=False),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Dropout(0.3),
                nn.Conv2d(4, 6, 3, stride=2),
                nn.Flatten(),
                nn.Linear(6 * 6 * 6, 4),
            )
            return fit(
                model,
                self.split,
                SHORT,
                seed=self.seed,
                progress=Progress(quiet=True),
                loss=loss,
                descent=adam if self.adam else sgd(SHORT),
                notes=self.notes,
                savepoints=kept,
                kept=[rng],
            )


@pytest.mark.parametrize("killed_at", KILLED_AT)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_fit_goes_on(adam: bool, seed: int, killed_at: int, small: Split, tmp_path: Path) -> None:
    training = Training(small, adam, seed)
    plain, notes = training(None), training.notes
    with pytest.raises(Killed):
        training(savepoints(tmp_path), killed_at)
    kept = savepoints(tmp_path)
    resumed = training(kept)
    assert training.steps == STEPS * (SHORT.epochs - FROM_EPOCH[killed_at])
    assert equal(plain, resumed)
    assert notes == training.notes
    assert (kept.earlier_seconds > 0) == (FROM_EPOCH[killed_at] > 0)
    assert not resumed.training


def test_savepoints_change_nothing(small: Split, tmp_path: Path) -> None:
    training = Training(small, adam=False, seed=0)
    plain = training(None)
    assert equal(plain, training(savepoints(tmp_path)))
    (file,) = tmp_path.iterdir()  # one state, however many epochs
    assert file.name == "training-1.state"
    assert equal(plain, training(savepoints(tmp_path)))  # a finished training is not repeated
    assert training.steps == 0


def test_killed_twice(small: Split, tmp_path: Path) -> None:
    training = Training(small, adam=True, seed=0)
    for killed_at in (STEPS + 1, STEPS):
        with pytest.raises(Killed):
            training(savepoints(tmp_path), killed_at)
    resumed = training(savepoints(tmp_path))
    assert training.steps == 2 * STEPS
    assert equal(resumed, training(None))


def test_each_training_has_a_state_of_its_own(small: Split, tmp_path: Path) -> None:
    first, second = Training(small, False, seed=0), Training(small, False, seed=1)
    kept = savepoints(tmp_path)
    first(kept)
    with pytest.raises(Killed):
        second(kept, STEPS + 1)
    kept = savepoints(tmp_path)
    first(kept)
    resumed = second(kept)
    assert (first.steps, second.steps) == (0, 3 * STEPS)
    assert equal(resumed, second(None))


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:-100], "empty": b"", "byte": bytes(changed)}[how])


@pytest.mark.parametrize("interrupted", [False, True])
def test_saving_takes_a_small_share_of_the_time(
    interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one-second epochs whose state takes a second to save; but a Ctrl-C loses no epoch."""
    clock, epoch, saved = 0.0, 0, []

    def write(*_: Any) -> None:
        nonlocal clock
        clock += 1
        saved.append(epoch)

    monkeypatch.setattr(savepoint, "SHARE", 0.1)
    monkeypatch.setattr(savepoint, "write_atomic", write)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    keep = savepoints(tmp_path).training([])
    for epoch in range(1, 26):
        if epoch == 20 and interrupted:
            monkeypatch.setattr(interrupt, "_asked", True)
            with pytest.raises(KeyboardInterrupt):
                keep()
            break
        clock += 1
        keep()
    assert saved == ([1, 11, 20] if interrupted else [1, 11, 21])


@pytest.mark.parametrize("how", ["cut", "empty", "byte"])
def test_what_is_damaged_is_set_aside(how: str, small: Split, tmp_path: Path) -> None:
    training = Training(small, adam=False, seed=0)
    with pytest.raises(Killed):
        training(savepoints(tmp_path), STEPS + 1)
    damage(tmp_path / "training-1.state", how)
    told = Told()
    kept = savepoints(tmp_path, progress=told)
    resumed = training(kept)
    assert training.steps == 4 * STEPS
    assert equal(resumed, training(None))
    (line,) = told.said
    assert "is damaged: kept as training-1.state.damaged-1" in line
    kept.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["training-1.state.damaged-1"]


def test_the_state_of_another_training_is_not_taken_up(small: Split, tmp_path: Path) -> None:
    training = Training(small, adam=False, seed=0)
    with pytest.raises(Killed):
        training(savepoints(tmp_path), STEPS + 1)
    told = Told()
    resumed = training(savepoints(tmp_path, identity=1, progress=told))
    assert training.steps == 4 * STEPS
    assert equal(resumed, training(None))
    assert "other code" in "".join(told.said)


def test_a_state_is_json_and_safetensors(small: Split, tmp_path: Path) -> None:
    training = Training(small, adam=False, seed=0)
    training(savepoints(tmp_path))
    _, card, tensors = (tmp_path / "training-1.state").read_bytes().split(b"\n", 2)
    assert set(json.loads(card)) == {"identity", "seconds", "states"}
    header = int.from_bytes(tensors[:8], "little")
    assert all("dtype" in entry for entry in json.loads(tensors[8 : 8 + header]).values())


# --- attacks ------------------------------------------------------------------------------------


Kill = Callable[..., Callable[[], int]]


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Kill:
    """Has a step of the coming trainings raise; what that gives counts their steps."""
    _ = ATTACKS["input_aware"]  # takes augment by name: it must not get the one below

    def arm(at: int | None, error: type[BaseException] = Killed) -> Callable[[], int]:
        steps: list[int] = []

        def counted(original: Callable[..., Any], *given: Any) -> Any:
            if len(steps) == at:
                raise error
            steps.append(1)
            return original(*given)

        monkeypatch.setattr(engine, "batch", partial(counted, make_batch))
        monkeypatch.setattr(control, "augment", partial(counted, augment))
        return lambda: len(steps)

    return arm


@pytest.mark.parametrize(
    ("attack", "seed", "deaths", "left"),
    [
        # in the first epoch, in a middle one, and, two epochs on, in the last
        *(("lira", seed, (1, 2 * STEPS + 1, 2 * STEPS - 1), STEPS) for seed in range(3)),
        ("blind", 0, (2 * STEPS + 1,), 2 * STEPS),
        ("input_aware", 0, (2 * STEPS + 1,), 2 * STEPS),
        # in the second of its surrogate's two epochs, then in the victim's third
        ("clean_label", 0, (STEPS + 1, 3 * STEPS + 1), 2 * STEPS),
    ],
)
def test_attacks_go_on(
    attack: str,
    seed: int,
    deaths: tuple[int, ...],
    left: int,
    attacker: AttackContext,
    small: Split,
    tmp_path: Path,
    kill: Kill,
) -> None:
    """``deaths``: the step of each process at which it was killed."""

    def run(kept: Savepoints | None) -> Any:
        ctx = replace(attacker, train=small, recipe=SHORT, seed=seed, notes={}, savepoints=kept)
        with isolated(seed):
            return ATTACKS[attack]().run(ctx)

    for at in deaths:
        kill(at)
        with pytest.raises(Killed):
            run(savepoints(tmp_path))
    steps = kill(None)
    resumed = run(savepoints(tmp_path))
    assert steps() == left
    plain = run(None)
    assert equal(plain.model, resumed.model)
    assert equal(plain.trigger, resumed.trigger)
    assert plain.notes == resumed.notes


# --- runs ---------------------------------------------------------------------------------------

SETTINGS = {
    "shapes": {"train_count": 128, "test_count": 40},
    "mnist_fast": {"epochs": 4, "batch_size": 32},
}


def victim(output: Path, force: bool = False, progress: Progress | None = None) -> Victim:
    config = RunConfig(
        attack=("badnets",),
        defense=("none",),
        dataset="shapes",
        target=1,
        benign_fraction=0.1,
        output=str(output),
        force=force,
        set=SETTINGS,
    )
    plan = prepare(config, progress or Told())
    return Victim(plan, plan.attacks[0], 0)


def states(output: Path) -> list[Path]:
    return list(output.glob("models/*.unfinished/*"))


def tensors(output: Path) -> bytes:
    (file,) = output.glob("models/*/model.safetensors")
    return file.read_bytes()


def test_an_interrupted_run_goes_on(tmp_path: Path, kill: Kill) -> None:
    kill(2 * STEPS + 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        _ = victim(tmp_path / "killed").model
    assert len(states(tmp_path / "killed")) == 1
    assert not list(tmp_path.glob("killed/models/*/card.json"))
    steps = kill(None)
    _ = victim(tmp_path / "killed").model
    assert steps() == 2 * STEPS
    assert len(list(tmp_path.glob("killed/models/*"))) == 1
    _ = victim(tmp_path / "plain").model
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "plain")


KILLING = """
import os, signal
from itertools import count
from pathlib import Path
from purebench import savepoint, training
from tests.test_resume import STEPS, victim

steps, original = count(), training.batch

def batch(*given):
    if next(steps) == 2 * STEPS + 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given)

training.batch = batch
savepoint.SHARE = float("inf")
victim(Path({output!r})).model
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="of Unix")
def test_sigkill(tmp_path: Path, kill: Kill) -> None:
    root = Path(__file__).parent.parent
    script = KILLING.format(output=str(tmp_path / "killed"))
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    steps = kill(None)
    _ = victim(tmp_path / "killed").model
    assert steps() == 2 * STEPS
    assert len(list(tmp_path.glob("killed/models/*"))) == 1
    _ = victim(tmp_path / "plain").model
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "plain")


@pytest.mark.parametrize("why", ["force", "code", "threads"])
def test_what_must_begin_anew(
    why: str,
    tmp_path: Path,
    kill: Kill,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kill(2 * STEPS + 1)
    with pytest.raises(Killed):
        _ = victim(tmp_path).model
    again = victim(tmp_path, force=why == "force")
    if why == "code":
        monkeypatch.setattr(running, "_code", lambda *_: "changed")
    if why == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    steps = kill(None)
    _ = again.model
    assert steps() == 4 * STEPS
    assert not states(tmp_path)


def test_an_attack_that_cannot_end_leaves_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack: Any = ATTACKS["badnets"]
    original = attack.run

    def run(self: Any, ctx: AttackContext) -> None:
        original(self, ctx)
        assert states(tmp_path)
        raise NotApplicable("no")

    monkeypatch.setattr(attack, "run", run)
    with pytest.raises(NotApplicable):
        _ = victim(tmp_path).model
    assert not states(tmp_path)
