"""Documents say what the records say: a table in one is what the command above it prints.

``pytest tests/test_documents.py --refresh`` writes them anew.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from purebench import ATTACKS, DEFENSES
from purebench.cli import OK, main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLISHED = ROOT / "leaderboards" / "published"
BLOCK = re.compile(r"(<!-- ((?:leaderboard|list) [^\n]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


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


def test_the_readme_counts_what_is_there() -> None:
    """The control that poisons nothing is no attack, and doing nothing is no defense."""
    text = (ROOT / "README.md").read_text("utf-8")
    boards = [folder for folder in PUBLISHED.iterdir() if folder.is_dir()]
    attacks, defenses = len(ATTACKS.names()) - 1, len(DEFENSES.names()) - 1
    assert f"{attacks} attacks, {defenses} defenses" in " ".join(text.split())
    assert f"[{len(boards)} boards](" in text
