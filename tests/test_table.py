"""Tables are pure functions of records: every number worked by hand."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from purebench.evaluate import Scores
from purebench.record import Cell, Record, read_records

table: Any = import_module("purebench.leaderboards.table")


def scores(acc: int, asr: int, ra: int = 0) -> Scores:
    """In percent: of 1,000 clean images and 500 triggered ones."""
    return Scores(10 * acc, 1000, 5 * asr, 5 * ra, 500, 100, 0)


def record(
    attack: str, defense: str, after: Scores | None, seed: int = 0, **changed: Any
) -> Record:
    """Of an attack that left ACC 90 % and ASR 100 %."""
    cell = Cell(
        dataset={"name": "shapes", "settings": {}},
        model={"name": "small_cnn", "settings": {}},
        attack={"name": attack, "settings": {}},
        defense={"name": defense, "settings": {}},
        recipe={"name": "mnist_fast", "settings": {}},
        seed=seed,
        poison_rate=0.1,
        clean_label=False,
        target=0,
        all_to_all=False,
        benign_fraction=0.05,
        benign_source="train",
    )
    made = Record(
        cell, "f", "v", "ok", scores(90, 100), after, benign_count=3000,
        cost={"seconds": 2.0 + seed, "peak_memory_bytes": 1},
    )  # fmt: skip
    return replace(made, **changed)


def only(records: list[Record], attack: str, defense: str = "prune") -> Any:
    (row,) = [row for row in table.rows(records)[attack] if row.defense == defense]
    return row


THREE = [
    record("blend", "prune", scores(88, 10, 70), seed=0),
    record("blend", "prune", scores(86, 20, 60), seed=1),
    record("blend", "prune", scores(84, 60, 20), seed=2),
]


# --- rows ---------------------------------------------------------------------------------------


def test_a_row_holds_one_number_a_cell() -> None:
    row = only(THREE, "blend")
    assert row.acc == (0.88, 0.86, 0.84)
    assert row.asr == (0.1, 0.2, 0.6)
    assert row.ra == (0.7, 0.6, 0.2)
    assert row.der == pytest.approx(((0.9 - 0.02 + 1) / 2, (0.8 - 0.04 + 1) / 2, (0.4 + 0.94) / 2))
    assert row.seconds == (2, 3, 4)
    assert row.worst_asr == 0.6
    assert row.benign_count == 3000
    assert row.remarks == ()


def test_mean_and_sample_deviation() -> None:
    """ASR 10, 20, 60: mean 30, deviation sqrt((400 + 100 + 900) / 2) = 26.46. DER 94, 88, 67:
    mean 83, deviation sqrt((121 + 25 + 256) / 2) = 14.18."""
    line = next(line for line in table.markdown(THREE).splitlines() if line.startswith("| prune"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "prune", "86.00 ± 2.00", "30.00 ± 26.46", "50.00 ± 26.46", "83.00 ± 14.18", "3.0 ± 1.0",
        "3,000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "percent", "text"),
    [
        ((), True, "–"),
        ((0.5,), True, "50.00"),
        ((0.25,), False, "0.2"),
        ((0.99994,), True, "99.99"),
        ((0.1, 0.3), True, "20.00 ± 14.14"),
    ],
)
def test_spread(values: tuple[float, ...], percent: bool, text: str) -> None:
    assert table.spread(values, percent) == text


@pytest.mark.parametrize("status", ["failed", "diverged"])
@pytest.mark.parametrize("after", [None, scores(90, 0, 90)])
def test_what_did_not_finish_counts_as_the_worst(status: str, after: Scores | None) -> None:
    bad = record("blend", "prune", after, seed=1, status=status, error="ValueError: no")
    row = only([THREE[0], bad], "blend")
    assert (row.acc, row.asr, row.ra) == ((0.88, 0), (0.1, 1), (0.7, 0))
    assert row.der[1] == 0
    assert row.seconds == (2,)
    assert row.remarks == (f"{status}: ValueError: no",)


def test_a_skipped_cell_does_not_count() -> None:
    skipped = record("blend", "prune", None, seed=1, status="skipped", error="no convolution")
    row = only([THREE[0], skipped], "blend")
    assert row.acc == (0.88,)
    assert row.remarks == ("skipped: no convolution",)
    alone = only([skipped], "blend")
    assert (alone.acc, alone.asr, alone.worst_asr) == ((), (), None)


def test_the_undefended_row_rates_a_half() -> None:
    assert only([record("blend", "none", scores(90, 100))], "blend", "none").der == (0.5,)


def test_a_degenerate_network_is_flagged() -> None:
    after = replace(scores(10, 0), most_predicted_count=951)
    assert "degenerate" in only([record("blend", "prune", after)], "blend").remarks[0]


def test_order() -> None:
    """Undefended first though it is worst, then by DER, by worst ASR, by name; skipped last."""
    records = [
        record("blend", "skipped", None, status="skipped", error="no"),
        record("blend", "zeta", scores(90, 10)),
        record("blend", "alpha", scores(90, 10)),
        record("blend", "good", scores(90, 5)),
        record("blend", "even", scores(85, 5)),  # DER as of alpha, ASR lower
        record("blend", "none", scores(90, 100)),
        record("blend", "failed", None, status="failed", error="no"),
    ]
    expected = ["none", "good", "even", "alpha", "zeta", "failed", "skipped"]
    for given in (records, records[::-1]):
        assert [row.defense for row in table.rows(given)["blend"]] == expected


# --- boards and names ---------------------------------------------------------------------------


def with_cell(made: Record, **changed: Any) -> Record:
    return replace(made, cell=replace(made.cell, **changed))


def test_what_cannot_be_compared_stands_apart() -> None:
    """Another model, another benign share: other tables, same title but for what differs."""
    other = [with_cell(one, benign_fraction=0.01) for one in THREE]
    lenet = [with_cell(one, model={"name": "lenet", "settings": {}}) for one in THREE]
    assert [len(board) for board in table.boards([*THREE, *other, *lenet])] == [3, 3, 3]
    assert table.screen([*THREE, *lenet]).count("prune") == 2


def test_protocols_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="pb-0, pb-1"):
        table.boards([THREE[0], replace(THREE[1], protocol="pb-0")])


def test_settings_are_named_where_they_differ() -> None:
    weak, strong = (
        with_cell(THREE[0], defense={"name": "prune", "settings": {"budget": b, "steps": 4}})
        for b in (0.01, 0.2)
    )
    names = {row.defense for row in table.rows([weak, strong])["blend"]}
    assert names == {"prune (budget=0.01)", "prune (budget=0.2)"}
    rates = [with_cell(THREE[0], poison_rate=rate) for rate in (0.1, 0.01)]
    assert set(table.rows(rates)) == {"blend (rate=0.1)", "blend (rate=0.01)", "mean"}


# --- several attacks ----------------------------------------------------------------------------


def test_the_mean_is_over_attacks() -> None:
    records = [*THREE[:1], record("badnets", "prune", scores(80, 50, 40))]
    assert list(table.rows(records)) == ["blend", "badnets", "mean"]
    row = only(records, "mean")
    assert row.asr == (pytest.approx(0.3),)
    assert row.worst_asr == 0.5
    assert "mean" not in table.rows(THREE)


def test_a_mean_over_fewer_attacks_says_so() -> None:
    records = [
        *THREE[:1],
        record("badnets", "prune", scores(80, 50)),
        record("blend", "tune", None),
    ]
    assert only(records, "mean").remarks == ()
    assert only(records, "mean", "tune").remarks[0] == "1 of 2 attacks"


def test_weak_attacks_are_marked_and_out_of_the_mean() -> None:
    records = [*THREE[:1], record("badnets", "prune", scores(80, 50), before=scores(90, 79))]
    assert only(records, "badnets").remarks == ("weak attack",)
    assert only(records, "badnets").asr == (0.5,)
    mean = only(records, "mean")
    assert mean.asr == (0.1,)
    assert mean.remarks == ("without weak attacks",)


@pytest.mark.parametrize("before", [None, replace(scores(10, 0), nonfinite_count=3)])
def test_an_attack_that_failed_is_not_a_weak_one(before: Scores | None) -> None:
    """Its cells are never dropped."""
    bad = record("badnets", "prune", None, before=before, status="diverged", error="NaN")
    assert only([*THREE[:1], bad], "mean").asr == (pytest.approx(0.55),)
    assert only([*THREE[:1], bad], "mean").worst_asr == 1


def test_the_control_has_accuracy_alone() -> None:
    control = [
        record("none", "none", scores(90, 2), before=scores(90, 2)),
        record("none", "prune", scores(80, 0), before=scores(90, 2)),
        record("none", "tune", scores(91, 9), before=scores(90, 2)),
    ]
    rows = table.rows([*control, *THREE, record("badnets", "prune", scores(80, 50))])
    assert [row.defense for row in rows["none"]] == ["none", "tune", "prune"]
    assert [row.acc for row in rows["none"]] == [(0.9,), (0.91,), (0.8,)]
    assert all((row.asr, row.ra, row.der) == ((), (), ()) for row in rows["none"])
    assert not any(row.remarks for row in rows["none"])
    assert rows["mean"][0].acc == pytest.approx((0.84, 0.86, 0.84))
    lines = table.markdown(control).splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        "prune", "80.00", "–", "–", "–", "2.0", "3,000",
    ]  # fmt: skip
    for row in csv.DictReader(io.StringIO(table.as_csv(control))):
        assert (row["asr"], row["ra"], row["der"], row["worst_asr"]) == ("", "", "", "")


# --- forms --------------------------------------------------------------------------------------

AWKWARD = record(
    "blend", "prune", None, seed=3, status="failed", error='a | b, "c"\nsecond line; café'
)
ALL = [*THREE, AWKWARD, record("badnets", "prune", scores(80, 50)), record("none", "prune", None)]


def test_markdown_escapes_what_would_break_a_table() -> None:
    text = table.markdown([*THREE, AWKWARD])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "a \\| b" in lines[2]


def test_csv_is_read_back() -> None:
    rows = list(csv.DictReader(io.StringIO(table.as_csv([*THREE, AWKWARD]))))
    assert len(rows) == 1
    row = rows[0]
    assert (row["attack"], row["defense"], row["n"]) == ("blend", "prune", "4")
    assert float(row["asr"]) == pytest.approx((0.1 + 0.2 + 0.6 + 1) / 4)
    assert float(row["asr_std"]) == pytest.approx(0.4113, abs=1e-4)
    assert float(row["worst_asr"]) == 1
    assert row["remarks"] == f"failed: {AWKWARD.error}"


def test_json_is_read_back() -> None:
    boards = json.loads(table.as_json([*THREE, AWKWARD]))
    assert [board["attack"] for board in boards] == ["blend"]
    (row,) = boards[0]["rows"]
    assert row["asr"] == [0.1, 0.2, 0.6, 1.0]
    assert row["n"] == 4
    assert row["remarks"] == [f"failed: {AWKWARD.error}"]
    assert boards[0]["title"].startswith("shapes · small_cnn · blend, 0.1 of the training split")


def test_titles() -> None:
    assert table.title(THREE, "blend").endswith("target 0 · 5 % benign · seeds 0, 1, 2")
    assert (
        table.title(ALL, "none")
        == "shapes · small_cnn · no attack (clean control) · 5 % benign · seed 0"
    )
    assert table.title(ALL, "mean").endswith(
        "mean over badnets, blend · 5 % benign · seeds 0, 1, 2, 3"
    )


@pytest.mark.parametrize("render", ["screen", "markdown", "as_csv", "as_json"])
def test_the_same_records_give_the_same_text(render: str) -> None:
    records = [record for record in ALL if record.after is not None]
    first = getattr(table, render)(records)
    assert first == getattr(table, render)(list(records))
    assert "small_cnn" in first or render == "as_csv"
    assert "prune" in first


# --- the boards that are published ---------------------------------------------------------------

BOARDS = sorted((Path(__file__).parent.parent / "leaderboards" / "published").glob("*/README.md"))


@pytest.mark.parametrize("page", BOARDS, ids=lambda page: page.parent.name)
def test_a_published_board_is_what_its_records_say(page: Path) -> None:
    assert page.read_text("utf-8").endswith(table.markdown(read_records([page.parent])))


def test_there_is_a_published_board() -> None:
    assert BOARDS
