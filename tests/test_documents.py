"""Documents say what the records say: a table in one is what the command above it prints.

``pytest tests/test_documents.py --refresh`` writes them anew.
"""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from purebench import DEFENSES
from purebench.cli import OK, main
from purebench.record import read_records

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLISHED = ROOT / "leaderboards" / "published"
BLOCK = re.compile(r"(<!-- (leaderboard [^\n]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_follow_from_records(
    document: Path,
    pytestconfig: pytest.Config,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    text = document.read_text("utf-8")

    def printed(block: re.Match[str]) -> str:
        assert main(shlex.split(block[2])) == OK
        return f"{block[1]}\n{capsys.readouterr().out.strip()}\n\n{block[4]}"

    wanted = BLOCK.sub(printed, text)
    if pytestconfig.getoption("--refresh"):
        document.write_text(wanted, "utf-8")
    assert text == wanted or pytestconfig.getoption("--refresh"), "pytest --refresh writes it anew"


def test_blocks_are_found() -> None:
    """A pattern that matches nothing would hold nothing to anything."""
    text = "a\n<!-- leaderboard x --attack mean -->\n\n| old |\n\n<!-- end -->\nb\n"
    (block,) = BLOCK.finditer(text)
    assert block[2] == "leaderboard x --attack mean"
    assert block[3].strip() == "| old |"


def test_in_how_many_runs_the_revision_makes_no_difference() -> None:
    """docs/robust_recovery.md tells it of boards whose records are of robust_recovery's revision
    5: they note what each strength seemed to cost, up to the one that was taken, and rewriting."""
    new: Any = DEFENSES["robust_recovery"]()
    price = import_module("purebench.defenses._distil").PRICE
    text = " ".join((ROOT / "docs" / "robust_recovery.md").read_text("utf-8").split())
    for board, told in {
        "mnist-small_cnn": "in 66 of the 72 runs of the first board",
        "mnist-small_cnn-unseen": "in all 30 of the second",
        "mnist-small_cnn-rate0.01": "in 51 of 54 at a poison rate of .01",
        "mnist-lenet": "in 22 of 27 of lenet",
        "mnist-one_hidden": "3 of 6 of one_hidden",
        "mnist-preact_resnet18-width8": "2 of 5 of the residual network on MNIST",
    }.items():
        records = [
            record
            for record in read_records([PUBLISHED / board / "records"])
            if record.cell.defense["name"] == "robust_recovery"
        ]
        assert {record.cell.defense["revision"] for record in records} == {5}
        same = 0
        for record in records:
            tried, rewriting = record.notes["benign_drop_by_strength"], record.notes["rewriting"]
            within = [float(s) for s, (drop, error) in tried.items() if drop - error <= new.budget]
            cost, _ = rewriting["benign_drop"]
            same += (within[0], rewriting["taken"], cost <= price) == (
                record.notes["strength"], True, True,
            )  # fmt: skip
        counts = [int(number) for number in re.findall(r"\b\d+\b", told.replace(".01", ""))]
        assert counts in ([same, len(records)], [len(records)] if same == len(records) else [])
        assert told in text


def test_every_promise_names_its_test() -> None:
    """Rows of docs/reliability.md, each with tests that are there."""
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, f"without a test: {row}"
        for file, test in named:
            source = (ROOT / "tests" / file).read_text("utf-8")
            assert f"\ndef {test}(" in source, f"{file} has no {test}"
