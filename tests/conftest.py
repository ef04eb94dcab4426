"""A small backdoored network, and what attacker and defender of it hold."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from purebench import (
    ATTACKS,
    DATASETS,
    MODELS,
    AttackContext,
    BackdooredModel,
    DataBundle,
    DefenseContext,
    Goal,
    LoadContext,
    Recipe,
    Task,
    savepoint,
)
from purebench.data import make_bundle
from purebench.progress import Progress
from purebench.registry import REGISTRIES
from purebench.seeding import isolated

from .pretended import pretended

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh", action="store_true", help="write tables in documents anew")


RECIPE = Recipe(epochs=3, batch_size=64, lr=0.05, nesterov=True, schedule="linear", warmup=0.2)


@pytest.fixture(autouse=True)
def _a_state_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the epochs of a test are."""
    monkeypatch.setattr(savepoint, "SHARE", math.inf)


@pytest.fixture(autouse=True)
def _plugins_unregistered() -> Iterator[None]:
    """What --plugin registered is gone after the test."""
    yield
    for registry in REGISTRIES:
        for name, cls in list(registry._classes.items()):
            if cls.__module__.startswith("purebench_plugin_"):
                del registry._classes[name]


@pytest.fixture(
    params=[
        "pretended",
        pytest.param(
            "real",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def gpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A CUDA device: one that is none, see ``pretended``, and what is there."""
    if request.param == "real":
        yield torch.device("cuda")
    else:
        with pretended() as device:
            yield device


@pytest.fixture(scope="session")
def bundle() -> DataBundle:
    """Synthetic shapes; a quarter of the training split is benign."""
    source = DATASETS["shapes"]().load(LoadContext(Path("unused"), offline=True))
    return make_bundle("shapes", source, seed=0, benign_fraction=0.25, held_out=False)


@pytest.fixture(scope="session")
def task(bundle: DataBundle) -> Task:
    return Task.of(bundle.train, bundle.num_classes)


def _attacker(bundle: DataBundle, task: Task) -> AttackContext:
    def build() -> torch.nn.Module:
        with isolated(0):
            return MODELS["small_cnn"]().build(task)

    return AttackContext(
        train=bundle.train,
        task=task,
        goal=Goal(bundle.num_classes, target=1),
        build=build,
        poison_rate=0.2,
        recipe=RECIPE,
        device=torch.device("cpu"),
        seed=0,
        progress=Progress(quiet=True),
    )


@pytest.fixture
def attacker(bundle: DataBundle, task: Task) -> AttackContext:
    """Of a small_cnn on shapes, target class 1."""
    return _attacker(bundle, task)


@pytest.fixture(scope="session")
def _victim(bundle: DataBundle, task: Task) -> BackdooredModel:
    return ATTACKS["badnets"]().run(_attacker(bundle, task))


@pytest.fixture
def victim(_victim: BackdooredModel) -> BackdooredModel:
    """A small_cnn with a BadNets back door. Shared: change copies only."""
    return _victim


@pytest.fixture
def defender(bundle: DataBundle) -> DefenseContext:
    """Who is to purify ``victim``."""
    return DefenseContext(
        benign=bundle.benign,
        num_classes=bundle.num_classes,
        recipe=RECIPE,
        device=torch.device("cpu"),
        seed=0,
        progress=Progress(quiet=True),
    )
