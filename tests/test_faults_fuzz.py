"""Cards, records, sweeps and settings of any content are read, or refused by name; nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from purebench import UsageError
from purebench import artifact as artifacts
from purebench.artifact import CARD, Damaged
from purebench.config import read_config, read_sweep
from purebench.record import Unreadable, parse_record
from purebench.runner import Victim
from purebench.settings import build, convert

from .faults import run, victim

table: Any = import_module("purebench.leaderboards.table")
undefended: Any = import_module("purebench.leaderboards.undefended")

SHORT, LONG = 60, 2_000
EFFORTS = [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["ok", "1e-3", "none", "all", "blend", "small_cnn", "-1", "0.5", "nan", "="])
)
names = st.text(max_size=8)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every part of JSON-able content."""
    yield path
    if isinstance(content, (dict, list)):
        parts = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in parts:
            yield from places(value, (*path, key))


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> Any:
    """``whole`` with one to three of its parts replaced, removed or added to."""
    content = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(content))))
        if not path:
            return draw(anything)
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        deed = draw(st.sampled_from(["replace", "remove", "add"]))
        if deed == "replace":
            holder[path[-1]] = draw(anything)
        elif deed == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(names)] = draw(anything)
        else:
            holder.append(draw(anything))
    return content


def fuzz(examples: int, **drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run the function below it on that many drawn values."""

    def over(check: Callable[..., None]) -> None:
        effort = settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        effort(given(**drawn)(check))()

    return over


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("done")
    run(output, defense=("none",))
    return output


@pytest.fixture
def of(done: Path, tmp_path: Path) -> Victim:
    """A network of one's own to damage."""
    shutil.copytree(done, tmp_path / "results")
    return victim(tmp_path / "results")


@pytest.mark.parametrize("examples", EFFORTS)
def test_cards(examples: int, of: Victim) -> None:
    """Even those that vouch for themselves."""
    file = of.folder / CARD
    whole = json.loads(file.read_text())
    assert of._load() is not None

    @fuzz(examples, card=changed(whole), vouched=st.booleans())
    def check(card: Any, vouched: bool) -> None:
        if vouched and isinstance(card, dict):
            card.pop("card_sha256", None)
            with suppress(ValueError):  # NaN, which no digest is of
                card["card_sha256"] = artifacts._digest(card)
        file.write_text(json.dumps(card))
        with suppress(Damaged):
            assert of._load() is not None


@pytest.mark.parametrize("examples", EFFORTS)
def test_records(examples: int, done: Path) -> None:
    whole = json.loads(next(done.rglob("records/*/*.json")).read_text())

    @fuzz(examples, record=changed(whole))
    def check(record: Any) -> None:
        """What is read can be shown and written."""
        with suppress(Unreadable):
            found = parse_record(json.dumps(record).encode(), "record.json")
            for render in (table.markdown, table.as_csv, table.as_json, undefended.markdown):
                render([found]).encode()
            found.write(done / "again.json")

    @fuzz(examples, content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
    def check_bytes(content: bytes) -> None:
        with suppress(Unreadable):
            parse_record(content, "record.json")


SWEEP = {
    "dataset": "shapes",
    "attack": ["badnets", "none"],
    "defense": "all",
    "model": ["small_cnn", "lenet"],
    "poison_rate": [0.1, "5e-2"],
    "benign_fraction": [0.05],
    "seeds": [0, 1],
    "all_to_all": False,
    "set": {"small_cnn": {"width": 2}, "mnist_fast": {"lr": "1e-3", "epochs": 1}},
}


def refusal(read: Callable[[], object]) -> None:
    """UsageError, in one line, is the one refusal."""
    told = None
    try:
        read()
    except UsageError as error:
        told = str(error)
    assert told is None or (told.strip() and "\n" not in told)


@pytest.mark.parametrize("examples", EFFORTS)
def test_sweeps(examples: int, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    assert len(read_sweep(str(_write(file, SWEEP)), {})) == 4

    @fuzz(examples, sweep=changed(SWEEP))
    def check(sweep: Any) -> None:
        _write(file, sweep)
        refusal(lambda: read_sweep(str(file), {}))
        refusal(lambda: read_config(str(file), {}))

    letters = st.text("ab: -[]{}\n\t#&*!|>'\"%@`,?~0.\\\ud7ff\ufeff\x00", max_size=60)

    @fuzz(examples, text=letters)
    def check_text(text: str) -> None:
        file.write_text(text, "utf-8")
        refusal(lambda: read_sweep(str(file), {}))

    @fuzz(examples, content=st.binary(max_size=60))
    def check_bytes(content: bytes) -> None:
        file.write_bytes(content)
        refusal(lambda: read_sweep(str(file), {}))


def _write(file: Path, content: Any) -> Path:
    file.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
    return file


@dataclass(frozen=True)
class Sample:
    """One setting of every kind."""

    alpha: float = 0.2
    steps: int = 4
    fast: bool = False
    mode: Literal["soft", "hard"] = "soft"
    label: str = "x"
    sizes: tuple[int, ...] = (1, 2)
    limit: float | None = None


KINDS = [bool, int, float, str, *get_type_hints(Sample).values()]


@pytest.mark.parametrize("examples", EFFORTS)
def test_settings(examples: int) -> None:
    keys = st.sampled_from([*vars(Sample()), "alfa"]) | names

    @fuzz(examples, values=st.dictionaries(keys, anything, max_size=4))
    def check(values: dict[str, Any]) -> None:
        refusal(lambda: build(Sample, values, "sample"))

    @fuzz(examples, value=anything, kind=st.sampled_from(KINDS))
    def check_value(value: Any, kind: Any) -> None:
        refusal(lambda: convert(value, kind, "sample: value"))
