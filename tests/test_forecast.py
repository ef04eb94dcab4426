"""Forecast: schedules counted by hand, and what records and networks say of the past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from purebench.cli import OK, main
from purebench.forecast import Forecast, Past, Step, Work, wall_seconds
from purebench.record import read_record


def training(name: str, where: str = "mnist, small_cnn", sizes: str = "") -> Step:
    return Step("attack", name, where, sizes)


def defense(name: str, where: str = "mnist, small_cnn") -> Step:
    return Step("defense", name, where)


NONE, PRUNE = defense("none"), defense("prune")
PAST = Past(
    seconds={training("blend"): 100.0, NONE: 1.0, PRUNE: 9.0},
    network_bytes={training("blend"): 4e6, training("badnets"): 2e6},
    record_bytes=5e3,
)


@pytest.mark.parametrize(
    ("chains", "workers", "expected"),
    [
        ([], 3, 0),
        ([(5, [1, 2])], 1, 8),
        ([(5, [1, 2])], 2, 7),  # the second has to wait for the training
        ([(5, [1, 2])], 9, 7),
        ([(4, []), (3, []), (3, [])], 2, 6),
        ([(2, [6]), (3, [1, 1])], 2, 8),
    ],
)
def test_wall_seconds(
    chains: list[tuple[float, list[float]]], workers: int, expected: float
) -> None:
    assert wall_seconds(chains, workers) == expected


def test_one_victim_is_one_workers_or_many() -> None:
    work = Work(training("blend"), True, (NONE, PRUNE, PRUNE))
    whole = Forecast.of([work], PAST, 4, split=False)
    assert (whole.trainings, whole.work_seconds, whole.wall_seconds) == (1, 119, 119)
    split = Forecast.of([work], PAST, 4, split=True)
    assert (split.work_seconds, split.wall_seconds) == (119, 110)
    assert split.written_bytes == whole.written_bytes == 4e6 + 3 * 5e3
    assert str(split) == (
        "1 trainings; training and defending: about 2 min, 2 min with 4 at once; to write: about "
        "4 MB"
    )


def test_a_network_that_is_there_costs_nothing() -> None:
    found = Forecast.of([Work(training("blend"), False, (PRUNE,))], PAST, 1, split=False)
    assert (found.trainings, found.work_seconds, found.written_bytes) == (0, 9, 5e3)


def test_what_is_not_known_is_counted_and_named() -> None:
    lenet = "mnist, lenet"
    works = [
        Work(training("wanet"), True, (NONE, defense("clp"))),
        Work(training("blend", lenet), True, (defense("none", lenet),)),
    ]
    found = Forecast.of(works, PAST, 1, split=False)
    assert found.work_seconds == 1
    assert found.written_bytes == 3e6 + 3 * 5e3  # wanet's as the mean of the others'
    assert str(found) == (
        "2 trainings; training and defending: at least 1 s; to write: at least 3 MB\n"
        "not counted, for want of records: 2 of 2 trainings, the defenses of 2 cells: "
        "blend, none (mnist, lenet); clp, wanet (mnist, small_cnn); the size of 1 files"
    )


def test_where_nothing_is_known_nothing_is_forecast() -> None:
    found = Forecast.of([Work(training("blend"), True, (NONE,))], Past(), 1, split=False)
    unknown = "unknown, for want of records"
    assert str(found) == f"1 trainings; training and defending: {unknown}; to write: {unknown}"
    done = str(Forecast.of([], Past(), 1, split=False))
    assert done == "0 trainings; training and defending: about 0 s; to write: about 0 bytes"


CELL: dict[str, Any] = {
    "dataset": {"name": "shapes", "settings": {"train_count": 200}},
    "model": {"name": "small_cnn", "settings": {"width": 2}},
    "recipe": {"name": "mnist_fast", "settings": {"epochs": 1}},
    "attack": {"name": "blend", "settings": {"alpha": 0.2}},
    "defense": {"name": "nad", "settings": {"epochs": 9}},
    "benign_fraction": 0.05,
}


@pytest.mark.parametrize(
    ("part", "other", "trains_alike"),
    [
        ("dataset", {"name": "cifar10", "settings": {}}, False),
        ("dataset", {"name": "shapes", "settings": {"train_count": 9000}}, False),
        ("model", {"name": "small_cnn", "settings": {"width": 64}}, False),
        ("recipe", {"name": "bb100", "settings": {"epochs": 1}}, False),
        ("recipe", {"name": "mnist_fast", "settings": {"epochs": 100}}, False),
        ("defense", {"name": "nad", "settings": {"epochs": 1}}, True),
        ("benign_fraction", 0.5, True),
    ],
)
def test_seconds_count_for_what_takes_as_long(part: str, other: Any, trains_alike: bool) -> None:
    cell = {**CELL, part: other}
    assert (Step.of("attack", cell) == Step.of("attack", CELL)) == trains_alike
    assert Step.of("defense", cell) != Step.of("defense", CELL)


def test_networks_of_another_width_tell_no_size() -> None:
    past = Past(network_bytes={training("blend", sizes="[2]"): 7.0})
    assert past.network_size(training("wanet", sizes="[2]")) == 7
    assert past.network_size(training("wanet", sizes="[64]")) is None


@pytest.mark.parametrize(
    ("workers", "seconds"), [(1, 900_000), (8, 112_500), (100, 9_000), (5_000, 186 + 2 * 86)]
)
def test_ten_thousand_cells(workers: int, seconds: float) -> None:
    """400 victims of 100 s, each with 25 cells of 86 s: all workers are busy to the end, unless
    there are so many that the last of them have nothing to do."""
    a, d = training("a"), defense("d")
    past = Past({a: 100.0, d: 86.0}, {a: 5e6}, 4e3)
    works = [Work(a, True, (d,) * 25)] * 400
    found = Forecast.of(works, past, workers, split=True)
    assert (found.trainings, found.work_seconds) == (400, 900_000)
    assert found.wall_seconds == seconds
    assert found.written_bytes == 400 * 5e6 + 10_000 * 4e3


def test_the_past_is_what_lies_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--attack none --defense none prune --dataset shapes --quiet --set "
    words += "shapes.train_count=200 shapes.test_count=60 small_cnn.width=2 mnist_fast.epochs=1"
    assert main(words.split()) == OK
    files = [*tmp_path.glob("results/records/*/*.json")]
    records = [read_record(file) for file in files]
    past = Past.of(tmp_path / "results")
    trained = Step.of("attack", vars(records[0].cell))
    assert trained.where == "shapes, small_cnn, mnist_fast, 1 epochs"
    assert past.seconds == {
        trained: records[0].cost["training_seconds"],
        **{Step.of("defense", vars(record.cell)): record.cost["seconds"] for record in records},
    }
    sizes = [file.stat().st_size for file in tmp_path.glob("results/models/*/*")]
    assert past.network_bytes == {trained: sum(sizes)}
    assert past.record_bytes == sum(file.stat().st_size for file in files) / 2
    assert Past.of(tmp_path / "nowhere") == Past()
