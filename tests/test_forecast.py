"""Forecast: schedules counted by hand, and what records and networks say of the past."""

from __future__ import annotations

from pathlib import Path

import pytest

from purebench.cli import OK, main
from purebench.forecast import Forecast, Past, Work, wall_seconds
from purebench.record import read_record

PAST = Past(
    seconds={
        ("attack", "blend", "small_cnn"): 100.0,
        ("defense", "none", "small_cnn"): 1.0,
        ("defense", "prune", "small_cnn"): 9.0,
    },
    network_bytes={("blend", "small_cnn"): 4e6, ("badnets", "small_cnn"): 2e6},
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
    work = Work("blend", "small_cnn", True, ("none", "prune", "prune"))
    whole = Forecast.of([work], PAST, 4, split=False)
    assert (whole.trainings, whole.work_seconds, whole.wall_seconds) == (1, 119, 119)
    split = Forecast.of([work], PAST, 4, split=True)
    assert (split.work_seconds, split.wall_seconds) == (119, 110)
    assert split.written_bytes == whole.written_bytes == 4e6 + 3 * 5e3


def test_a_network_that_is_there_costs_nothing() -> None:
    found = Forecast.of([Work("blend", "small_cnn", False, ("prune",))], PAST, 1, split=False)
    assert (found.trainings, found.work_seconds, found.written_bytes) == (0, 9, 5e3)


def test_what_is_not_known_is_named() -> None:
    works = [
        Work("wanet", "small_cnn", True, ("none", "clp")),
        Work("blend", "lenet", True, ("none",)),
    ]
    found = Forecast.of(works, PAST, 1, split=False)
    assert found.unknown == (
        "blend (lenet)", "clp (small_cnn)", "none (lenet)", "wanet (small_cnn)",
        "size of lenet's networks",
    )  # fmt: skip
    assert found.written_bytes == 3e6 + 3 * 5e3  # wanet's as the mean of the others'
    assert "not counted, for want of records: blend (lenet), clp" in str(found)


@pytest.mark.parametrize(
    ("workers", "seconds"), [(1, 900_000), (8, 112_500), (100, 9_000), (5_000, 186 + 2 * 86)]
)
def test_ten_thousand_cells(workers: int, seconds: float) -> None:
    """400 victims of 100 s, each with 25 cells of 86 s: all workers are busy to the end, unless
    there are so many that the last of them have nothing to do."""
    past = Past({("attack", "a", "m"): 100.0, ("defense", "d", "m"): 86.0}, {("a", "m"): 5e6}, 4e3)
    works = [Work("a", "m", True, ("d",) * 25)] * 400
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
    assert past.seconds == {
        ("attack", "none", "small_cnn"): records[0].cost["training_seconds"],
        **{
            ("defense", record.cell.defense["name"], "small_cnn"): record.cost["seconds"]
            for record in records
        },
    }
    sizes = [file.stat().st_size for file in tmp_path.glob("results/models/*/*")]
    assert past.network_bytes == {("none", "small_cnn"): sum(sizes)}
    assert past.record_bytes == sum(file.stat().st_size for file in files) / 2
    assert Past.of(tmp_path / "nowhere") == Past()
