"""The examples of CONTRIBUTING.md, taken from the page, are plug-ins that keep the contract."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from purebench import ATTACKS, DEFENSES, AttackContext, BackdooredModel, DefenseContext
from purebench.contract import ATTACK_CHECKS, DEFENSE_CHECKS
from purebench.registry import load_plugin

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text("utf-8")


@pytest.fixture
def examples(tmp_path: Path) -> Iterator[None]:
    """Loaded for one test, as ``--plugin`` would, and forgotten after it."""
    written = dict(re.findall(r"`(\w+/\w+\.py)`, whole:\n\n```python\n(.*?)```", PAGE, re.DOTALL))
    assert set(written) == {"defenses/weight_noise.py", "attacks/corner_dot.py"}
    for name, code in written.items():
        file = tmp_path / Path(name).name
        file.write_text(code, "utf-8")
        load_plugin(file)
    yield
    del DEFENSES._classes["weight_noise"], ATTACKS._classes["corner_dot"]


@pytest.mark.usefixtures("examples")
def test_the_defense(victim: BackdooredModel, defender: DefenseContext) -> None:
    for check in DEFENSE_CHECKS:
        check(DEFENSES["weight_noise"], victim, defender)


@pytest.mark.usefixtures("examples")
def test_the_attack(attacker: AttackContext) -> None:
    for check in ATTACK_CHECKS:
        check(ATTACKS["corner_dot"], attacker)
