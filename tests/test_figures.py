"""Figures for papers: all of them, in three formats, the same bytes each time."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import fmean as mean_of
from typing import Any

import pytest

from benchmarks import leaderboard
from purebench.cli import OK, main
from purebench.errors import UsageError
from purebench.record import read_records

pytest.importorskip("matplotlib", reason="figures need it: pip install 'purebench[figures]'")

figures: Any = import_module("purebench.leaderboards.figures")
rows: Any = import_module("purebench.leaderboards.rows")

PUBLISHED = Path(__file__).parent.parent / "leaderboards" / "published" / "mnist-one_hidden"
STARTS = {".pdf": b"%PDF", ".svg": b"<?xml", ".png": b"\x89PNG"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command filled."""
    folder = tmp_path_factory.mktemp("figures") / "drawn"
    assert main(["leaderboard", str(PUBLISHED), "--figures", str(folder)]) == OK
    return folder


def test_each_board_has_its_figures(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == sorted(
        f"01-mnist-one_hidden-{kind}{ending}"
        for kind in ("asr", "ranks", "scatter")
        for ending in STARTS
    )
    for path in drawn.iterdir():
        content = path.read_bytes()
        assert content.startswith(STARTS[path.suffix])
        assert not any(word in content for word in (b"CreationDate", b"<dc:date>", b"tIME"))


def test_the_bytes_are_the_same_each_time(drawn: Path, tmp_path: Path) -> None:
    for path in figures.draw(read_records([PUBLISHED]), tmp_path):
        assert path.read_bytes() == (drawn / path.name).read_bytes(), path.name


def test_the_svg_shows_every_defense_and_number(drawn: Path) -> None:
    """Text is drawn as paths: matplotlib leaves what was drawn as comments."""
    heat = (drawn / "01-mnist-one_hidden-asr.svg").read_text("utf-8")
    (board,) = rows.boards(read_records([PUBLISHED]))
    (mean,) = (table for table in board.tables if table.kind == "mean")
    for text in (*mean.attacks, *(row.defense for row in mean.rows)):
        assert f"<!-- {text} -->" in heat
    left = [100 * mean_of(row.asr) for t in board.tables if t.kind == "attack" for row in t.rows]
    assert min(left) < 9 < 11 < max(left)
    for value in left:
        assert f"<!-- {value:.1f} -->" in heat or f"<!-- {value:.0f} -->" in heat
    ranks = (drawn / "01-mnist-one_hidden-ranks.svg").read_text("utf-8")
    assert f"critical difference {mean.ranking.critical_difference:.2f}" in ranks


@pytest.mark.parametrize("name", ["x" * 500, "../../$a_b$ <b>&\n"], ids=["long", "odd"])
def test_names_do_no_harm(tmp_path: Path, name: str) -> None:
    """Single runs of one attack: neither grid nor ranks, and nothing outside the folder."""
    plugin = {"name": name, "settings": {}}
    records = [record for record in read_records([PUBLISHED]) if record.cell.seed == 0][:2]
    named = [replace(r, cell=replace(r.cell, dataset=plugin, defense=plugin)) for r in records]
    written = figures.draw(named, tmp_path / "folder")
    assert len(written) == 3
    assert {path.parent for path in written} == {tmp_path / "folder"}
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"matplotlib: pip install 'purebench\[figures\]'"):
        figures.draw(read_records([PUBLISHED]), tmp_path)


def test_the_benchmark_makes_every_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert leaderboard.main(["--records", "120"]) == OK
    shown = capsys.readouterr().out
    outputs = ("reading", "screen", "markdown", "latex", "csv", "json", "page", "figures")
    assert all(re.search(rf"^{name} .* [1-9]\d*$", shown, re.MULTILINE) for name in outputs)
    assert "120 records" in shown


def test_squares_tell_a_tenth_where_little_is_left() -> None:
    told = {0.0: "0.0", 0.0034: "0.3", 0.0994: "9.9", 0.0996: "10", 0.204: "20", 1.0: "100"}
    square: Any = import_module("purebench.leaderboards.charts").square
    assert {share: square(share) for share in told} == told
