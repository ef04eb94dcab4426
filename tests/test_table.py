"""Tables are pure functions of records: every number worked by hand."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

from purebench.record import Cell, Record
from purebench.scores import Scores

table: Any = import_module("purebench.leaderboards.table")
rows: Any = import_module("purebench.leaderboards.rows")
intervals: Any = import_module("purebench.leaderboards.intervals")
ranks: Any = import_module("purebench.leaderboards.ranks")
undefended: Any = import_module("purebench.leaderboards.undefended")


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


def tables(records: list[Record]) -> dict[str, Any]:
    """Of the one board that the records make up."""
    (board,) = rows.boards(records)
    return {found.attack: found for found in board.tables}


def defenses(found: Any) -> list[str]:
    return [row.defense for row in found.rows]


def only(records: list[Record], attack: str, defense: str = "prune") -> Any:
    (row,) = [row for row in tables(records)[attack].rows if row.defense == defense]
    return row


def only_row(found: Any) -> Any:
    (row,) = found.rows
    return row


def lines(text: str) -> list[list[str]]:
    """The cells of every line of a Markdown table but its headings; a mean and its deviation are
    held together by hard spaces."""
    assert " ± " not in text
    text = text.replace("\u00a0±\u00a0", " ± ")
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in found if not line[0].startswith(":")][1:]


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
    assert lines(table.markdown(THREE)) == [[
        "prune", "86.00 ± 2.00", "30.00 ± 26.46", "50.00 ± 26.46", "83.00 ± 14.18", "3.0 ± 1.0",
        "3,000",
    ]]  # fmt: skip


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
        assert defenses(tables(given)["blend"]) == expected


# --- boards and names ---------------------------------------------------------------------------


def with_cell(made: Record, **changed: Any) -> Record:
    return replace(made, cell=replace(made.cell, **changed))


def test_what_cannot_be_compared_stands_apart() -> None:
    """Another model, another benign share: other tables, same title but for what differs."""
    other = [with_cell(one, benign_fraction=0.01) for one in THREE]
    lenet = [with_cell(one, model={"name": "lenet", "settings": {}}) for one in THREE]
    boards = rows.boards([*THREE, *other, *lenet])
    assert [len(board.records) for board in boards] == [3, 3, 3]
    assert [board.name for board in boards] == [
        "shapes · small_cnn · 5 % benign",
        "shapes · small_cnn · 1 % benign",
        "shapes · lenet · 5 % benign",
    ]
    assert table.screen([*THREE, *lenet]).count("prune") == 2


def test_protocols_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="pb-0, pb-1"):
        rows.boards([THREE[0], replace(THREE[1], protocol="pb-0")])


def test_settings_are_named_where_they_differ() -> None:
    weak, strong = (
        with_cell(THREE[0], defense={"name": "prune", "settings": {"budget": b, "steps": 4}})
        for b in (0.01, 0.2)
    )
    names = set(defenses(tables([weak, strong])["blend"]))
    assert names == {"prune (budget=0.01)", "prune (budget=0.2)"}
    wide, narrow = (
        with_cell(THREE[0], model={"name": "small_cnn", "settings": {"width": width}})
        for width in (16, 4)
    )
    assert [board.setting for board in rows.boards([wide, narrow])] == [
        "5 % benign · small_cnn.width=16",
        "5 % benign · small_cnn.width=4",
    ]
    assert (
        "small_cnn · blend, 0.1 of the training split, target 0 · 5 % benign · small_cnn.width=4"
        in (table.screen([wide, narrow]))
    )


def test_settings_that_are_no_defaults_are_named() -> None:
    """Wherever they stand alone; older records, which do not tell them, share their name."""
    cell = {
        "model": {"name": "small_cnn", "settings": {"width": 4, "depth": 3}},
        "attack": {"name": "blend", "settings": {"alpha": 0.1, "pattern": None}},
        "defense": {"name": "prune", "settings": {"budget": 0.2, "steps": 4}},
        "recipe": {"name": "mnist_fast", "settings": {"epochs": 6, "lr": 0.1}},
    }
    told = {"model": ["width"], "attack": ["alpha"], "defense": ["steps"], "recipe": ["epochs"]}
    named = replace(with_cell(THREE[0], **cell), changed=told)
    older = with_cell(THREE[1], **cell)
    (board,) = rows.boards([named, older])
    assert board.setting == "5 % benign · small_cnn.width=4, mnist_fast.epochs=6"
    found = tables([named, older])
    assert set(found) == {"blend (alpha=0.1)"}
    assert defenses(found["blend (alpha=0.1)"]) == ["prune (steps=4)"]
    bare = with_cell(named, defense={"name": "none", "settings": {}})
    assert "blend (alpha=0.1)" in undefended.markdown([replace(bare, cost={})])


def test_poison_rates_have_tables_and_means_of_their_own() -> None:
    """What has one rate alone is part of every mean; no mean counts an attack twice."""
    rates = [with_cell(THREE[0], poison_rate=rate) for rate in (0.1, 0.01)]
    assert set(tables(rates)) == {"blend (rate=0.1)", "blend (rate=0.01)"}
    scarce = with_cell(record("scarce", "prune", scores(80, 90)), poison_rate=0.003)
    found = tables([*rates, scarce])
    assert set(found) - set(tables(rates)) == {"scarce", "mean (rate=0.01)", "mean (rate=0.1)"}
    for label in ("mean (rate=0.01)", "mean (rate=0.1)"):
        assert found[label].rows[0].asr == (pytest.approx((0.1 + 0.9) / 2),)
        assert f"{label} over blend, scarce" in found[label].title
    assert [chosen.attack for chosen in found.values() if chosen.chosen(["mean"])] == [
        "mean (rate=0.01)",
        "mean (rate=0.1)",
    ]


def test_an_attack_s_own_rate_stands_in_for_one_it_was_not_run_at() -> None:
    """Most run at .1 and .01, `stealthy` at .003 and .01: .003 is no condition of its own."""
    common = [
        with_cell(record(attack, "prune", scores(80, asr)), poison_rate=rate)
        for attack in ("blend", "wanet", "sig")
        for rate, asr in ((0.1, 30), (0.01, 20))
    ]
    stealthy = [
        with_cell(record("stealthy", "prune", scores(80, asr)), poison_rate=rate)
        for rate, asr in ((0.003, 90), (0.01, 60))
    ]
    (board,) = rows.boards([*common, *stealthy])
    low, high = board.conditions
    assert (low.attack, low.rows[0].asr) == ("mean (rate=0.01)", (pytest.approx(0.3),))
    assert (high.attack, high.rows[0].asr) == ("mean (rate=0.1)", (pytest.approx(0.45),))
    assert "stealthy (rate=0.003)" in high.attacks
    assert len(low.attacks) == len(high.attacks) == 4


# --- several attacks ----------------------------------------------------------------------------


def test_the_mean_is_over_attacks() -> None:
    records = [*THREE[:1], record("badnets", "prune", scores(80, 50, 40))]
    assert list(tables(records)) == ["blend", "badnets", "mean"]
    row = only(records, "mean")
    assert row.asr == (pytest.approx(0.3),)
    assert row.worst_asr == 0.5
    assert "mean" not in tables(THREE)


def test_a_mean_over_fewer_attacks_says_so() -> None:
    records = [
        *THREE[:1],
        record("badnets", "prune", scores(80, 50)),
        record("blend", "tune", None),
    ]
    assert only(records, "mean").remarks == ()
    assert only(records, "mean", "tune").remarks[0] == "1 of 2 attacks"
    skipped = record("badnets", "tune", None, status="skipped", error="no")
    assert only([*records, skipped], "mean", "tune").remarks[0] == "1 of 2 attacks"
    assert not only([*records, skipped], "mean", "tune").complete


def other(attack: str) -> list[Record]:
    """THREE, of another attack."""
    return [recast(record, attack) for record in THREE]


@pytest.mark.parametrize("missing", range(3))
def test_a_mean_over_fewer_runs_says_so_and_does_not_compete(missing: int) -> None:
    """Of three attacks with three seeds, a defense lacks one run, or one attack."""
    whole = [*THREE, *other("badnets"), *other("wanet")]
    part = [
        replace(r, cell=replace(r.cell, defense={"name": "tune", "settings": {}})) for r in whole
    ]
    gone = part[3 * missing + missing]
    for left, told in (
        ([r for r in part if r is not gone], "8 of 9 runs"),
        ([r for r in part if r.cell.attack != gone.cell.attack], "2 of 3 attacks"),
        ([r for r in part if r.cell.attack != gone.cell.attack][1:], "5 of 9 runs"),
        (part, None),
    ):
        row = only([*whole, *left], "mean", "tune")
        assert row.remarks == (() if told is None else (told,))
        assert row.complete == (told is None)
        assert (row.rank is None) == (told is not None)
        assert only([*whole, *left], "mean").complete


def test_a_mean_is_over_the_seeds_that_all_attacks_have() -> None:
    """Else its spread over seeds would be that of attacks."""
    records = [*THREE, *other("badnets")[:2]]
    found = tables(records)["mean"]
    assert found.title.endswith("seeds 0, 1")
    assert found.rows[0].asr == (0.1, 0.2)
    assert found.rows[0].complete
    apart = [*THREE[:1], *other("badnets")[1:]]  # there are none: then all
    assert tables(apart)["mean"].title.endswith("seeds 0, 1, 2")


@pytest.mark.parametrize("seed", range(3))
def test_attacks_that_are_weak_on_some_seed_are_marked_and_out_of_the_mean(seed: int) -> None:
    weak = other("badnets")
    weak[seed] = replace(weak[seed], before=scores(90, 79))
    reason = "weak attack: the undefended network has an ASR under 80 %"
    assert only(weak, "badnets").remarks == (reason,)
    assert len(only(weak, "badnets").asr) == 3
    broken = replace(weak[seed], before=replace(scores(90, 95), most_predicted_count=951))
    told = only([broken], "badnets").remarks
    assert told == ("weak attack: the undefended network gives one class",)
    records = [*THREE, *weak, *other("wanet")]
    found = tables(records)["mean"]
    assert "mean over blend, wanet ·" in found.title
    assert (found.weak, set(found.attacks)) == (("badnets",), {"badnets", "blend", "wanet"})
    assert found.rows[0].asr == pytest.approx((0.1, 0.2, 0.6))
    assert found.rows[0].complete
    assert "not counted, since on some seed it did not take: badnets" in table.screen(records)
    assert "mean" not in tables([*THREE, *weak])


def test_an_attack_that_every_defense_skipped_is_not_in_the_mean() -> None:
    skipped = [replace(r, status="skipped", error="no", after=None) for r in other("badnets")]
    found = tables([*THREE, *skipped, *other("wanet")])["mean"]
    assert "mean over blend, wanet ·" in found.title
    assert found.rows[0].complete


@pytest.mark.parametrize("before", [None, replace(scores(10, 0), nonfinite_count=3)])
def test_an_attack_that_failed_is_not_a_weak_one(before: Scores | None) -> None:
    """Its cells are never dropped."""
    bad = record("badnets", "prune", None, before=before, status="diverged", error="NaN")
    assert only([*THREE[:1], bad], "mean").asr == (pytest.approx(0.55),)
    assert only([*THREE[:1], bad], "mean").worst_asr == 1


def test_no_mean_mixes_poison_rates() -> None:
    """wanet, run at .1 alone, has no place in the mean at .01."""
    records = [
        with_cell(record(attack, "prune", scores(80, asr)), poison_rate=rate)
        for rate, asr in ((0.1, 30), (0.01, 20))
        for attack in ("blend", "badnets")
    ]
    found = tables([*records, record("wanet", "prune", scores(80, 90))])
    assert only_row(found["mean (rate=0.01)"]).asr == (pytest.approx(0.2),)
    assert only_row(found["mean (rate=0.1)"]).asr == (pytest.approx(0.5),)


def test_what_is_no_default_stands_in_the_title_of_its_table() -> None:
    alphas = [
        with_cell(made, attack={"name": "blend", "settings": {"alpha": alpha}})
        for made, alpha in zip(THREE, (0.1, 0.2, 0.2), strict=True)
    ]
    alone = replace(alphas[0], changed={"attack": ["alpha"]})
    (title,) = (found.title for found in tables([alone]).values())
    assert "blend (alpha=0.1), 0.1 of the training split, target 0" in title
    titles = [found.title for found in tables(alphas).values() if found.kind == "attack"]
    assert ["alpha=0.1" in title for title in titles] == [True, False]
    for changed, told in (
        ({"target": 3}, "target=3"),
        ({"all_to_all": True}, "all_to_all=True"),
        ({"benign_source": "held_out"}, "benign_source=held_out"),
    ):
        (board,) = rows.boards([with_cell(made, **changed) for made in THREE])
        assert told in board.name
        assert all(told in found.title for found in board.tables)


def test_variants_that_differ_by_a_setting_that_one_lacks_are_two_rows() -> None:
    bare, given = ({"name": "prune", "settings": s} for s in ({"a": 1}, {"a": 1, "b": 2}))
    found = tables(
        [
            with_cell(record("blend", "prune", scores(80, 30)), defense=bare),
            with_cell(record("blend", "prune", scores(80, 90)), defense=given),
        ]
    )
    assert defenses(found["blend"]) == ["prune (b=default)", "prune (b=2)"]
    data = [
        with_cell(made, dataset={"name": "npz", "settings": {}, "digest": digest})
        for made, digest in zip(THREE, ("aa", "bb", "bb"), strict=True)
    ]
    assert len({board.name for board in rows.boards(data)}) == 2


def test_a_network_that_reactivation_broke_counts_as_the_worst() -> None:
    """The first class of logits that are NaN may or may not be the target."""
    broken = replace(scores(10, 0), nonfinite_count=1500)
    row = only([record("blend", "prune", scores(88, 10), reactivated=broken)], "blend")
    assert row.reactivated == (1.0,)
    assert row.remarks == ("diverged when reactivated",)


def test_a_mean_says_nothing_of_what_was_measured_on_some_attacks() -> None:
    again = [replace(made, reactivated=scores(80, 1)) for made in THREE]
    found = tables([*again, *other("badnets")])
    assert only_row(found["blend"]).reactivated == (pytest.approx(0.01),) * 3
    assert only_row(found["mean"]).reactivated == ()


def test_fewer_seeds_do_not_compete_against_one_attack_either() -> None:
    lucky = [record("blend", "clp", scores(88, 1), seed) for seed in (0, 1)]
    steady = [record("blend", "prune", scores(88, 12), seed) for seed in range(3)]
    found = tables([*lucky, *steady])["blend"]
    assert {row.defense: row.complete for row in found.rows} == {"clp": False, "prune": True}
    column = next(column for column in table.COLUMNS if column.name == "asr")
    assert table.outstanding(found, column) is None  # there is no rival


def test_an_attack_that_ran_at_other_seeds_alone_is_no_reason_to_fail() -> None:
    records = [
        record("wanet", "spectral", None, status="skipped", error="no training set"),
        record("wanet", "prune", scores(80, 10), 1),
        record("blend", "prune", scores(80, 10), 0),
        record("badnets", "prune", scores(80, 10), 0),
    ]
    assert "blend" in tables(records)


def test_the_undefended_row_does_not_keep_an_attack_that_all_skipped() -> None:
    skipped = {"status": "skipped", "error": "no training set"}
    records = [
        *THREE,
        *other("badnets"),
        *(record("lira", "none", scores(90, 100), seed) for seed in range(3)),
        *(record("lira", "prune", None, seed, **skipped) for seed in range(3)),
    ]
    row = next(row for row in tables(records)["mean"].rows if row.defense == "prune")
    assert (row.complete, row.remarks) == (True, ())


def test_a_network_that_is_not_the_undefended_row_s_is_told() -> None:
    bare = [record("blend", "none", scores(90, 100), seed) for seed in range(3)]
    found = tables([*bare, *THREE])["blend"]
    assert not any("another machine" in note for note in table.notes(found))
    assert "prune‡" not in table.screen([*bare, *THREE])
    moved = replace(THREE[2], before=scores(89, 100))
    found = tables([*bare, *THREE[:2], moved])["blend"]
    (note,) = [note for note in table.notes(found) if "another machine" in note]
    assert note.startswith("‡ ")
    assert note.endswith("than those of none")
    assert "\nprune‡ " in table.screen([*bare, *THREE[:2], moved])
    assert r"prune$^\ddagger$ " in table.latex([*bare, *THREE[:2], moved])


def test_a_lead_in_the_last_bit_is_none() -> None:
    ten = [record("blend", "prune", scores(80, 10), seed) for seed in range(3)]
    apart = [record("blend", "clp", scores(80, asr), seed) for seed, asr in enumerate((0, 0, 30))]
    column = next(column for column in table.COLUMNS if column.name == "asr")
    assert table.outstanding(tables([*ten, *apart])["blend"], column) is None


def test_who_is_no_better_than_a_fine_tuning_that_failed_is_not_judged() -> None:
    plain = [record(a, "fine_tune", scores(88, 90)) for a in ("blend", "badnets")]
    prune = [record(a, "prune", scores(88, 90)) for a in ("blend", "badnets")]
    assert tables([*plain, *prune])["mean"].idle == ("prune",)
    failed = replace(plain[0], status="failed", after=None, error="x")
    assert tables([failed, plain[1], *prune])["mean"].idle == ()


@pytest.mark.parametrize("text", ["=1+1", "\t=1+1", "\r=1+1", " =1+1", "-1", "@x"])
def test_a_name_is_no_formula(text: str) -> None:
    told = list(csv.reader(io.StringIO(table.as_csv([record("blend", text, scores(80, 10))]))))
    assert not any(cell.lstrip().startswith(("=", "@")) for line in told for cell in line)


def test_the_control_has_accuracy_alone() -> None:
    control = [
        record("none", "none", scores(90, 2), before=scores(90, 2)),
        record("none", "prune", scores(80, 0), before=scores(90, 2)),
        record("none", "tune", scores(91, 9), before=scores(90, 2)),
    ]
    found = tables([*control, *THREE, *other("badnets")])
    assert defenses(found["none"]) == ["none", "tune", "prune"]
    assert [row.acc for row in found["none"].rows] == [(0.9,), (0.91,), (0.8,)]
    assert all((row.asr, row.ra, row.der) == ((), (), ()) for row in found["none"].rows)
    assert not any(row.remarks for row in found["none"].rows)
    assert found["mean"].rows[0].acc == pytest.approx((0.88, 0.86, 0.84))
    assert lines(table.markdown(control))[-1] == ["prune", "80.00", "–", "–", "–", "2.0", "3,000"]
    for row in csv.DictReader(io.StringIO(table.as_csv(control))):
        assert (row["asr"], row["ra"], row["der"], row["worst_asr"]) == ("", "", "", "")


# --- statistics ---------------------------------------------------------------------------------


def test_t_interval() -> None:
    """Of 1, 2, 3: mean 2, deviation 1; Student's 0.975 quantile for two degrees is 4.3027."""
    low, high = intervals.t_interval((1.0, 2.0, 3.0))
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert intervals.t_interval((1.0, 2.0)) is None


def test_binomial_interval() -> None:
    """0 of 9,000: the upper end u solves (1 - u)^9000 = 0.025. 1 of 2: (1 - u)^2 = 0.025 is the
    chance of none below."""
    low, high = intervals.binomial_interval(0, 9000)
    assert (low, high) == (0, pytest.approx(1 - 0.025 ** (1 / 9000)))
    assert round(100 * high, 2) == 0.04
    assert intervals.binomial_interval(9000, 9000) == (pytest.approx(1 - high), 1)
    assert intervals.binomial_interval(1, 2)[0] == pytest.approx(1 - 0.975**0.5)


def test_a_single_run_has_the_interval_of_its_counts_and_three_that_of_their_mean() -> None:
    single = only(THREE[:1], "blend").intervals
    assert single["asr"] == intervals.binomial_interval(50, 500)
    assert single["acc"] == intervals.binomial_interval(880, 1000)
    assert "der" not in single
    assert only(THREE[:2], "blend").intervals == {}
    three = only(THREE, "blend").intervals
    assert three["acc"] == intervals.t_interval((0.88, 0.86, 0.84))
    assert three["asr"][0] == 0  # 30 % ± 66 %: a share has its ends
    assert "DER 95 %" not in table.screen(THREE)
    assert "DER 95 %" in table.screen([*THREE, *(recast(r, "badnets") for r in THREE)])


def recast(made: Record, attack: str) -> Record:
    return with_cell(made, attack={"name": attack, "settings": {}})


def test_ranks() -> None:
    """Over four attacks a is always first, b and c share second place once: ranks 1, 2.125 and
    2.875. Nemenyi's q for three is 2.343 (Demsar, table 5)."""
    ranking = ranks.rank(
        {"a": (0.9, 0.9, 0.9, 0.9), "b": (0.8, 0.8, 0.8, 0.5), "c": (0.7, 0.7, 0.7, 0.5)}
    )
    assert ranking.mean_ranks == {"a": 1, "b": 2.125, "c": 2.875}
    assert ranking.block_count == 4
    assert ranking.critical_difference == pytest.approx(2.3437 * (3 * 4 / (6 * 4)) ** 0.5, abs=1e-3)
    assert 0.01 < ranking.p_value < 0.05


def test_ranks_of_what_cannot_be_ranked() -> None:
    assert ranks.rank({"a": (0.9, 0.8)}) is None
    assert ranks.rank({"a": (0.9,), "b": (0.8,)}) is None
    assert ranks.rank({"a": (0.9, 0.8), "b": (0.8, 0.7)}).p_value is None
    equal = ranks.rank(dict.fromkeys("abc", (0.5, 0.5)))
    assert (equal.p_value, set(equal.mean_ranks.values())) == (None, {2})


def test_only_defenses_that_met_every_attack_are_ranked() -> None:
    """By mean DER over seeds: an attack is one block, however many seeds it has."""
    records = [*THREE, *(recast(r, "badnets") for r in THREE)]
    for attack in ("blend", "badnets"):
        records += [record(attack, "good", scores(90, 0), seed) for seed in range(3)]
    records += [record("blend", "partial", scores(90, 0)), record("blend", "none", scores(90, 100))]
    found = tables(records)["mean"]
    assert {row.defense: row.rank for row in found.rows} == {
        "none": None, "good": 1, "prune": 2, "partial": None,
    }  # fmt: skip
    assert found.ranking.block_count == 2
    assert "rank: mean over 2 attacks, by DER; too few attacks to tell" in table.screen(records)
    records += [recast(r, "wanet") for r in records if r.cell.attack["name"] == "blend"]
    records += [recast(r, "sig") for r in records if r.cell.attack["name"] == "blend"]
    assert "rank: mean over 4 attacks, by DER; ranks closer than 0.98 do" in table.screen(records)


def test_who_does_no_more_than_plain_tuning_is_named() -> None:
    """Five points of ASR on one attack are enough, unless they are within the spread."""
    left = {
        "fine_tune": ((90, 90), (60, 60)),
        "none": ((100, 100), (100, 100)),
        "acts_once": ((90, 90), (55, 55)),
        "too_little": ((86, 86), (60, 60)),
        "too_unsure": ((90, 90), (60, 20)),
        "worse": ((99, 99), (99, 99)),
    }
    records = [
        record(attack, name, scores(90, asr), seed=seed)
        for name, found in left.items()
        for attack, values in zip(("blend", "badnets"), found, strict=True)
        for seed, asr in enumerate(values)
    ]
    assert tables(records)["mean"].idle == ("too_little", "too_unsure", "worse")
    told = (
        "no gain over fine_tune on any attack (5 points of ASR, and more than the spread): "
        "too_little, too_unsure, worse"
    )
    assert told in table.screen(records)
    assert told not in table.screen(records, shown=["acc"])


def test_without_plain_tuning_nobody_is_named() -> None:
    records = [record(attack, "worse", scores(90, 99)) for attack in ("blend", "badnets", "wanet")]
    assert tables(records)["mean"].idle == ()
    plain = [record(attack, "fine_tune", scores(90, 99)) for attack in ("blend", "badnets")]
    assert tables([*records, *plain])["mean"].idle == ()
    assert tables([*records[:2], *plain])["mean"].idle == ("worse",)


def test_a_failed_cell_ranks_last() -> None:
    attacks = ("blend", "badnets")
    records = [record(attack, "prune", scores(90, 99)) for attack in attacks]
    records += [record(a, "bad", None, status="failed", error="no") for a in attacks]
    assert only(records, "mean", "bad").rank == 2


def test_the_mean_table_shows_what_the_unattacked_pay() -> None:
    control = [record("none", "prune", scores(acc, 0), seed=s) for s, acc in enumerate((89, 87))]
    records = [*control, *THREE, record("badnets", "prune", scores(80, 50))]
    assert only(records, "mean").control_drop == pytest.approx((0.01, 0.03))
    text = table.markdown(records, ["mean"])
    assert "clean ACC drop pp ↓" in text
    assert lines(text)[-1][3] == "2.00 ± 1.41"
    assert "clean ACC drop" not in table.markdown(records[2:])


def test_who_loses_accuracy_stands_below_the_line() -> None:
    records = [
        record("blend", "dear", scores(84, 0)),
        record("blend", "fair", scores(85, 50)),
        record("blend", "none", scores(90, 100)),
        record("blend", "skipped", None, status="skipped", error="no"),
    ]
    found = tables(records)["blend"]
    assert [(row.defense, row.group) for row in found.rows] == [
        ("none", 0), ("fair", 1), ("dear", 2), ("skipped", 3),
    ]  # fmt: skip
    text = table.screen(records)
    assert text.endswith("below the line: mean ACC drop over 5 points")
    shown = [line.split()[0] for line in text.splitlines()]
    assert shown[4] == "fair"
    assert set(shown[5]) == {"-"}
    assert shown[6] == "dear"
    assert lines(table.markdown(records))[2][0] == "*below: ACC drop > 5*"
    assert table.latex(records).count("\\midrule") == 2


def test_what_loses_too_much_alone_has_no_second_rule_under_the_head() -> None:
    records = [record("blend", "dear", scores(80, 1))]
    text = table.screen(records)
    assert text.endswith("below the line: mean ACC drop over 5 points")
    assert sum(set(line.split()[0]) == {"-"} for line in text.splitlines() if line.strip()) == 1
    assert table.latex(records).count("\\midrule") == 1


def reported(record: Record, **changed: Any) -> Record:
    return replace(record, provenance="self-reported", **changed)


def test_what_others_report_of_a_measured_defense_is_a_row_of_its_own() -> None:
    theirs = reported(record("blend", "prune", scores(80, 99), 7))
    rows = {row.defense: row for row in tables([*THREE, theirs])["blend"].rows}
    assert set(rows) == {"prune", "prune (self-reported)"}
    assert len(rows["prune"].acc) == len(THREE)
    text = with_cell(THREE[0], defense={"name": "prune", "settings": {"eps": 0.4}, "revision": 1})
    quoted = with_cell(
        replace(THREE[0], provenance=""),
        defense={"name": "prune", "settings": {"eps": "0.4"}, "revision": 1},
    )
    names = {row.defense for row in tables([text, quoted])["blend"].rows}
    assert names == {"prune (eps=0.4)", "prune (eps='0.4')"}


def test_what_others_report_has_no_say_in_what_a_mean_is_over() -> None:
    def mean(records: list[Record]) -> dict[str, Any]:
        made = {row.defense: row for row in tables(records)["mean"].rows}
        return {name: (row.der, row.complete, row.rank) for name, row in made.items()}

    ours = [
        record(attack, defense, scores(85, 5 + seed), seed)
        for attack in ("badnets", "blend", "wanet")
        for defense in ("prune", "clp", "ep")
        for seed in range(3)
    ]
    before = mean(ours)
    assert all(complete for _, complete, _ in before.values())
    weak = reported(record("blend", "mine", scores(85, 1), 0), before=scores(90, 10))
    elsewhere = [reported(record(a, "mine", scores(85, 1), 99)) for a in ("badnets", "blend")]
    another = reported(record("lira", "mine", scores(85, 1), 0))
    for more in ([weak], elsewhere, [another]):
        after = mean([*ours, *more])
        assert {name: after[name] for name in before} == before


def test_only_a_lead_beyond_the_spread_is_bold() -> None:
    """ACC of `ahead` leads by 3 against spreads of 2 and 0.7 together: bold; its ASR leads by 25
    against spreads of 26 and more: not."""
    ahead = [
        record("blend", "ahead", scores(acc, 5), seed) for seed, acc in enumerate((89, 90, 89))
    ]
    lead = ahead + THREE
    assert lines(table.markdown(lead))[0][1:3] == ["**89.33 ± 0.58**", "5.00 ± 0.00"]
    assert "\\textbf{89.33 $\\pm$ 0.58}" in table.latex(lead)
    assert "**" not in table.markdown([ahead[0], THREE[0]]).splitlines()[-2]  # single runs
    close = [
        record("blend", "close", scores(acc, 5, 60), seed) for seed, acc in enumerate((88, 87))
    ]
    assert "**" not in "".join(table.markdown(close + THREE).splitlines()[1:])


def test_n_is_shown_where_rows_differ_in_it() -> None:
    assert " n" not in table.screen(THREE).splitlines()[1]
    other = record("blend", "tune", scores(90, 5))
    assert [line[-1] for line in lines(table.markdown([*THREE, other]))] == ["1", "3"]


def test_reactivated_asr_has_a_column_where_it_was_measured() -> None:
    again = [replace(THREE[0], reactivated=scores(80, 60)), THREE[1]]
    failed = record("blend", "bad", None, status="failed", error="no")
    assert only(again, "blend").reactivated == (0.6,)
    assert only([*again, failed], "blend", "bad").reactivated == (1,)
    assert "reactivated ASR % ↓" in table.screen(again)
    assert "reactivated" not in table.screen(THREE)


def test_networks_that_reactivation_bends_as_a_whole_are_marked() -> None:
    """On the mean of a row; in a table that shows what reactivation found."""
    after = {"as_it_was": (80, 81), "bent": (60, 90)}
    records = [
        record("blend", name, scores(90, 10), seed, reactivated=scores(acc, 60))
        for name, found in after.items()
        for seed, acc in enumerate(found)
    ]
    text = table.screen(records)
    assert "60.00 ± 0.00†" in next(line for line in text.split("\n") if line.startswith("bent"))
    assert "\n† and over 10 points of ACC lost to the same ten samples" in text
    assert text.count("†") == 2
    assert "†" not in table.screen(records, shown=["asr"])
    assert "†" not in table.screen(records, shown=["reactivated"], top=1)
    assert only(records, "blend", "bent").bent == pytest.approx(0.15)


def test_stealth_is_the_mean_over_victims() -> None:
    measured = [
        replace(THREE[0], victim="a", stealth={"psnr": 20.0, "linf": 0.1}),
        replace(THREE[0], victim="a", stealth={"psnr": 20.0, "linf": 0.1}),
        replace(THREE[1], victim="b", stealth={"psnr": 30.0, "linf": float("inf")}),
    ]
    assert tables(measured)["blend"].stealth == {"psnr": 25, "linf": 0.1}
    json.loads(table.as_json(measured), parse_constant=pytest.fail)


# --- published numbers --------------------------------------------------------------------------

CIFAR = {
    "dataset": {"name": "cifar10", "settings": {}},
    "model": {"name": "preact_resnet18", "settings": {"width": 64}},
    "recipe": {"name": "bb100", "settings": {}},
}


def test_published_numbers_stand_beside_ours_in_their_setting_only() -> None:
    ours = with_cell(record("badnets", "none", scores(90, 100)), **CIFAR)
    row = only([ours], "badnets", "none")
    assert (row.published.acc, row.published.asr) == pytest.approx((0.9132, 0.9503))
    text = table.screen([ours])
    assert "published ACC % ↑" in text
    assert "91.32" in text
    assert "not measured here" in text
    elsewhere = with_cell(ours, model={"name": "resnet18", "settings": {}})
    narrow = with_cell(ours, model={"name": "preact_resnet18", "settings": {"width": 8}})
    rare = with_cell(ours, poison_rate=0.01)
    short = with_cell(ours, recipe={"name": "cifar_fast", "settings": {}})
    tuned = with_cell(ours, defense={"name": "fine_tune", "settings": {}})
    few = with_cell(tuned, benign_fraction=0.01)
    assert "published" in table.screen([tuned])
    for other in (elsewhere, narrow, rare, short, few, with_cell(ours, all_to_all=True)):
        assert "published" not in table.screen([other])
    assert "published" in table.screen([with_cell(ours, benign_fraction=0.01)])  # nobody used them


def test_a_published_clean_label_rate_counts_the_whole_split() -> None:
    """Half of one class in ten is 5 % of all."""
    ours = with_cell(
        record("clean_label", "none", scores(90, 100)), poison_rate=0.5, clean_label=True, **CIFAR
    )
    assert only([ours], "clean_label", "none").published.acc == pytest.approx(0.9329)


def test_a_published_mean_stands_in_the_mean_table() -> None:
    ours = [with_cell(record(a, "fine_tune", scores(90, 9)), **CIFAR) for a in ("blend", "badnets")]
    assert only(ours, "mean", "fine_tune").published.der == pytest.approx(0.7845)
    assert "published DER % ↑" in table.markdown(ours, ["mean"])
    rare = [with_cell(one, poison_rate=0.01) for one in ours]
    assert "published" not in table.markdown(rare, ["mean"])
    assert only([*ours, *rare], "mean (rate=0.1)", "fine_tune").published
    assert not only([*ours, *rare], "mean (rate=0.01)", "fine_tune").published


def test_two_revisions_of_a_defense_are_two_rows() -> None:
    first = record("blend", "prune", scores(90, 10))
    first = with_cell(first, defense={"name": "prune", "settings": {}, "revision": 1})
    later = with_cell(first, defense={"name": "prune", "settings": {}, "revision": 2})
    text = table.screen([first, later])
    assert "prune (revision=1)" in text
    assert "prune (revision=2)" in text
    assert "revision" not in table.screen([first])


def test_chosen_columns_only() -> None:
    text = table.markdown(THREE, [], ["acc", "der"])
    heading = next(line for line in text.splitlines() if line.startswith("| defense"))
    assert [cell.strip() for cell in heading.strip("|").split("|")] == [
        "defense",
        "ACC % ↑",
        "DER % ↑",
    ]
    with pytest.raises(ValueError, match="no column 'acd'; did you mean 'acc'"):
        table.screen(THREE, [], ["acd"])
    for name in ("reactivated", "rank"):  # of no record; of means, and here is none
        with pytest.raises(ValueError, match=f"no table there has the column '{name}'"):
            table.screen(THREE, [], ["acc", name])


def test_unknown_attacks_and_names_in_one_word() -> None:
    for render in (table.screen, table.markdown, table.latex, table.as_csv, table.as_json):
        with pytest.raises(ValueError, match="no table of attack 'blen'; did you mean 'blend'"):
            render(THREE, ["blend", "blen"])
    with pytest.raises(ValueError, match="no column 'acc,asr'; names are separated by spaces"):
        table.screen(THREE, [], ["acc,asr"])
    with pytest.raises(ValueError, match="'blend,mean'; names are separated by spaces"):
        table.screen(THREE, ["blend,mean"])


def widest(text: str) -> int:
    """Of the lines of tables, which have no commas."""
    return max(len(line) for line in text.splitlines() if "," not in line)


def test_a_narrow_terminal_has_the_columns_that_fit() -> None:
    records = [*THREE, *other("badnets")]
    whole = table.screen(records, ["mean"])
    assert table.screen(records, ["mean"], width=1000) == whole
    for width in (60, 80, 100):
        text = table.screen(records, ["mean"], width=width)
        assert widest(text) <= width < widest(whole)
        names = re.search(
            r" \d+ columns? left out .* terminal: (.*); leaderboard --columns",
            " ".join(text.split()),
        )
        assert names is not None
        left_out = names[1].split(", ")
        (found,) = [t for board in rows.boards(records) for t in board.tables if t.kind == "mean"]
        there = [column.name for column in table.columns(found)]
        assert left_out == [name for name in table.SPARED if name in there][: len(left_out)]
        assert not {"acc", "asr"} & set(left_out)
    shown = table.screen(records, ["mean"], ["acc", "seconds", "ra", "der"], width=20)
    asked = table.screen(records, ["mean"], ["acc", "seconds", "ra", "der"])
    assert shown.split() == asked.split()
    assert asked.splitlines()[1] in shown.splitlines()  # what is asked for is shown, room or not
    one = table.screen(records, ["mean"], width=widest(whole) - 1)
    assert "1 column left out" in one


def test_defense_acc_and_asr_are_never_spared() -> None:
    assert {column.name for column in table.COLUMNS} - set(table.SPARED) == {
        "defense",
        "acc",
        "asr",
    }
    lines = table.screen(THREE, width=1).splitlines()
    heading = next(line for line in lines if line.startswith("defense"))
    assert heading.split("  ")[0] == "defense"
    assert ("ACC %" in heading, "ASR %" in heading, "RA %" in heading) == (True, True, False)


def test_the_summary_is_the_means_or_what_there_is() -> None:
    several = [*THREE, *other("badnets")]
    assert table.summary(several) == table.screen(several, ["mean"])
    with_control = [*THREE, record("none", "prune", scores(88, 0))]
    assert table.summary(with_control) == table.screen(with_control, ["blend"])
    control = with_control[-1:]
    assert table.summary(control) == table.screen(control)


def test_remarks_stand_once_below_their_table() -> None:
    """By numbers, those of the rows that are seen, whatever columns are."""
    failed: Any = {"status": "failed", "error": "RuntimeError: no"}
    records = [
        *(record("blend", name, None, **failed) for name in ("one", "other")),
        record("blend", "third", None, status="skipped", error="no convolution"),
        record("blend", "best", scores(90, 1)),
    ]
    text = table.screen(records, shown=["acc"])
    words = [line.split()[0] for line in text.splitlines()]
    assert words[3:] == ["best", words[2], "one¹", "other¹", "third²", "¹", "²", "below"]
    assert text.count("\n¹ failed: RuntimeError: no\n² skipped: no convolution\n") == 1
    assert "\n¹ failed: RuntimeError: no\n\n² skipped" in table.markdown(records)
    assert "failed" not in table.screen(records, top=1)
    tex = table.latex(records)
    assert r"third$^{2}$" in tex
    assert r"$^{2}$ skipped: no convolution" in tex.partition(r"\caption{")[2].splitlines()[0]


# --- forms --------------------------------------------------------------------------------------

AWKWARD = record(
    "blend", "prune", None, seed=3, status="failed", error='a | b, "c"\nsecond line; café'
)
ALL = [*THREE, AWKWARD, record("badnets", "prune", scores(80, 50)), record("none", "prune", None)]


def test_markdown_escapes_what_would_break_a_table() -> None:
    text = table.markdown([*THREE, AWKWARD])
    found = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in found}) == 1
    assert '\n¹ failed: a \\| b, "c" second line; café\n' in text
    named = table.markdown([record("blend", "<b>`*[x](y)", scores(90, 10))])
    assert "\\<b>\\`\\*\\[x](y)" in named


def test_latex_escapes_what_it_would_obey() -> None:
    text = table.latex([record("blend", "a_b & 50% $x$ \\input{y}", scores(90, 10))])
    assert "a\\_b \\& 50\\% \\$x\\$" in text
    assert "\\input" not in text.replace("\\textbackslash", "")
    assert text.startswith("\\begin{table}\n\\centering\n\\caption{shapes $\\cdot$ small\\_cnn")
    assert "\\toprule" in text
    assert "ASR \\% $\\downarrow$" in text


def test_a_spreadsheet_sees_no_formula() -> None:
    text = table.as_csv([record("blend", "=1+1", scores(90, 10))])
    assert next(csv.DictReader(io.StringIO(text)))["defense"] == "'=1+1"


def test_a_terminal_sees_no_control_character() -> None:
    assert "\x1b" not in table.screen([record("blend", "\x1b[31mred", scores(90, 10))])


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
    titles = {attack: found.title for attack, found in tables(ALL).items()}
    assert tables(THREE)["blend"].title.endswith("target 0 · 5 % benign · seeds 0, 1, 2")
    assert titles["none"] == "shapes · small_cnn · no attack (clean control) · 5 % benign · seed 0"
    shared = "mean over badnets, blend · poison rate 0.1 · 5 % benign · seed 0"
    assert titles["mean"].endswith(shared)
    for other in ({"poison_rate": 0.003}, {"clean_label": True}):
        own = with_cell(record("adaptive", "prune", scores(80, 90)), **other)
        assert "adaptive, badnets, blend · 5 %" in tables([*ALL, own])["mean"].title


@pytest.mark.parametrize("render", ["screen", "markdown", "latex", "as_csv", "as_json"])
def test_the_same_records_give_the_same_text(render: str) -> None:
    records = [record for record in ALL if record.after is not None]
    first = getattr(table, render)(records)
    assert first == getattr(table, render)(list(records))
    assert "small" in first
    assert "prune" in first
