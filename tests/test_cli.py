"""The command line: what it answers, what it leaves on the disk, and what it refuses."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purebench import ATTACKS, DEFENSES, PoisoningAttack, doctor
from purebench.cli import FAILED, INTERRUPTED, OK, USAGE, main
from purebench.record import Record, read_record
from purebench.registry import REGISTRIES, Registry

ROOT = Path(__file__).parent.parent

TINY = {
    "shapes.train_count": 200,
    "shapes.test_count": 60,
    "small_cnn.width": 2,
    "mnist_fast.epochs": 1,
}
TOLD = "shapes.train_count=200, shapes.test_count=60, small_cnn.width=2, mnist_fast.epochs=1"

SHRINK = '''\
"""Shrink: scale the last layer down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from purebench import DEFENSES, Defense, DefenseContext


@DEFENSES.register("shrink")
@dataclass(frozen=True)
class Shrink(Defense):
    """factor: of the weights, 0 < factor <= 1."""

    paper: ClassVar[str] = "Nobody 2025"
    factor: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor must lie in (0, 1], got {self.factor}")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        with torch.no_grad():
            list(model.parameters())[-1].mul_(self.factor)
        ctx.notes["factor"] = self.factor
        return model
'''

FAULTY = """\
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from purebench import DEFENSES, Defense, DefenseContext, NotApplicable


@DEFENSES.register("faulty")
@dataclass(frozen=True)
class Faulty(Defense):
    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        {deed}
"""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def cached(self) -> list[str]:
        """The defenses whose results were there before."""
        return re.findall(r"\] (\w+): .*\(from the cache\)$", self.err, re.MULTILINE)

    @property
    def done(self) -> list[str]:
        return re.findall(r"\[\d+/\d+\] (\w+): ", self.err)


Bench = Callable[..., Answer]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bench(place: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """The command line."""

    def bench(*words: str) -> Answer:
        capsys.readouterr()
        code = main(words)
        return Answer(code, *capsys.readouterr())

    return bench


@pytest.fixture
def attack(bench: Bench) -> Bench:
    """The command line with a small network, small data and one epoch, but for what is given."""

    def attack(*words: str) -> Answer:
        line = " ".join(words)
        usual = {"--attack": "badnets", "--dataset": "shapes", "--device": "cpu"}
        if "--config" in words:
            del usual["--attack"]
        parts = {"--dataset": "shapes.", "--model": "small_cnn.", "--recipe": "mnist_fast."}
        foreign = tuple(part for option, part in parts.items() if option in words)
        small = {
            key: value
            for key, value in TINY.items()
            if not key.startswith(foreign) and f"{key}=" not in line
        }
        given = [word for pair in usual.items() if pair[0] not in words for word in pair]
        return bench(*given, *words, *(f"--set={key}={value}" for key, value in small.items()))

    return attack


def records(place: Path) -> dict[str, Record]:
    """File name without its fingerprint -> record."""
    files = (place / "results" / "records").rglob("*.json")
    return {file.name.rpartition("-")[0]: read_record(file) for file in files}


def every_record(place: Path) -> list[Record]:
    return [read_record(file) for file in (place / "results" / "records").rglob("*.json")]


def untrained(place: Path) -> bool:
    return not list(place.rglob("models"))


def refused(answer: Answer, message: str) -> None:
    """Exit code 2 and one line."""
    assert (answer.code, answer.out) == (USAGE, "")
    assert re.fullmatch(rf"error: .*{message}.*\n", answer.err), answer.err


# --- a run --------------------------------------------------------------------------------------


def test_run(attack: Bench, place: Path) -> None:
    answer = attack()
    quick = sorted(name for name in DEFENSES.names() if DEFENSES[name].default)
    assert answer.code == OK
    assert sorted(answer.done) == quick
    assert answer.cached == []
    assert "badnets, seed 0: undefended ACC " in answer.err
    rows = re.findall(r"^([a-z_]+)[¹²]? +[\d.]+ ", answer.out, re.MULTILINE)
    assert sorted(rows) == quick
    assert rows[0] == "none"
    assert (
        "shapes · small_cnn · badnets, 0.1 of the training split, target 0 · 5 % benign · "
        f"{TOLD} · seed 0" in answer.out
    )
    found = records(place)
    assert set(found) == {f"badnets-{name}-s0" for name in quick}
    assert all(record.status == "ok" and record.benign_count == 10 for record in found.values())
    printed = re.findall(r"^(?:Markdown|CSV|JSON|records) +(\S+)", answer.out, re.MULTILINE)
    assert len(printed) == 4
    assert all((place / path).exists() for path in printed)
    assert f"{printed[0]} ({len(quick)} files)\n" in answer.out
    assert len(list((place / printed[0]).iterdir())) == len(quick)
    assert ".json" not in answer.out.partition("\nJSON ")[0]


def test_the_leaderboard_reads_what_a_run_wrote(attack: Bench, bench: Bench) -> None:
    run = attack("--defense", "none", "prune")
    again = bench("leaderboard", "results")
    assert (again.code, again.err) == (OK, "")
    assert again.out.strip() in run.out
    refused(bench("leaderboard", "results", "--attack", "mean"), "no table of attack 'mean'; known")
    attack("--attack", "blend", "--defense", "none", "prune")
    both, own = (bench("leaderboard", "results", *more).out for more in ((), ("--over", "badnets")))
    assert own == again.out
    assert ("blend, 0.1 of" in both, "blend, 0.1 of" in own) == (True, False)
    first = bench("leaderboard", "results", "--over", "badnets", "--top", "1").out
    assert "the first 1 of 2 rows" in first
    assert len(first.splitlines()) == len(again.out.splitlines())  # a row less, a note more
    refused(bench("leaderboard", "results", "--top", "0"), "--top must be at least 1, got 0")
    refused(
        bench("leaderboard", "results", "--over", "badnet"), "--over badnet: no .* mean 'badnets'"
    )
    refused(bench("leaderboard", "results", "--over", "a,b"), "names are separated by spaces")
    attack("--defense", "clp")
    three, two = (bench("leaderboard", "results", "--over", "badnets", *more).out
                  for more in ((), ("--defense", "prune")))  # fmt: skip
    assert "clp" in three
    assert two == again.out
    refused(bench("leaderboard", "results", "--defense", "prun"), "no .* mean 'prune'")
    shared = records(Path())["badnets-prune-s0"].cell.benign_fraction
    twice = f"{2 * shared}"
    more = attack("--benign-fraction", twice, "--defense", "none", "prune").out
    chosen = ("leaderboard", "results", "--over", "badnets", "--benign-fraction")
    assert "benign" in (own := bench(*chosen, twice).out.strip())
    assert own in more
    one, both = (bench(*chosen, f"{shared}", *more).out for more in ((), (twice,)))
    assert (one, both.count("% benign")) == (three, 2)
    refused(bench(*chosen, "0.9"), "--benign-fraction 0.9: no record of it")
    refused(bench(*chosen, "few"), "--benign-fraction must be a number, got 'few'")
    refused(bench("leaderboard", "nowhere"), "nowhere: no such folder")
    refused(bench("leaderboard", "results/tables"), "no record there")
    refused(bench("leaderboard", "results", "--formt", "csv"), "did you mean '--format'")


def test_a_terminal_has_tables_that_fit_it(
    attack: Bench, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--defense", "none", "prune")
    piped = attack(*words).out
    monkeypatch.setenv("COLUMNS", "60")
    assert bench("leaderboard", "results").out.strip() in piped
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    for answer in (attack(*words), bench("leaderboard", "results")):
        assert "left out for the width of this terminal: " in " ".join(answer.out.split())
    assert "left out" not in bench("leaderboard", "results", "--format", "markdown").out


def test_help_names_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["leaderboard", "--help"])
    words = capsys.readouterr().out.split()
    table = importlib.import_module("purebench.leaderboards.table")
    assert {column.name for column in table.COLUMNS} - {"defense"} <= set(words)


def test_a_second_run_is_answered_from_the_cache(attack: Bench, place: Path) -> None:
    first = attack("--defense", "none", "prune")
    before = {file: file.read_bytes() for file in place.rglob("*.*") if file.is_file()}
    second = attack("--defense", "none", "prune")
    assert second.cached == second.done == first.done
    assert "training" not in second.err
    assert second.out == first.out
    assert {file: file.read_bytes() for file in place.rglob("*.*") if file.is_file()} == before


def test_a_changed_setting_reruns_its_defense_only(attack: Bench, place: Path) -> None:
    attack("--defense", "none", "prune", "fine_prune")
    again = attack("--defense", "none", "prune", "fine_prune", "--set", "prune.budget=0.5")
    assert again.cached == ["none", "fine_prune"]
    assert "training" not in again.err
    assert len(list((place / "results" / "models").iterdir())) == 1


def test_a_changed_attack_reruns_everything(attack: Bench, place: Path) -> None:
    attack("--defense", "none")
    for words in (["--poison-rate", "0.2"], ["--target", "1"], ["--seeds", "1"], ["--all-to-all"]):
        answer = attack("--defense", "none", *words)
        assert (answer.done, answer.cached) == (["none"], []), words
        assert "training" in answer.err
    assert len(list((place / "results" / "models").iterdir())) == 5


def test_force_repeats_to_the_bit(attack: Bench, place: Path) -> None:
    words = ("--defense", "none", "fine_tune", "prune", "--force")
    runs = []
    for _ in range(2):
        answer = attack(*words)
        assert (answer.code, answer.cached) == (OK, [])
        assert "training" in answer.err
        files = sorted((place / "results" / "records").rglob("*.json"))
        runs.append([json.loads(file.read_text()) for file in files])
    costs = [[record.pop("cost") for record in run] for run in runs]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 3
    assert costs[0] != costs[1]


def test_several_attacks_and_seeds(attack: Bench, place: Path) -> None:
    answer = attack(
        "--attack", "badnets", "--attack", "none", "--defense", "none", "--seeds", "0", "5"
    )
    assert answer.code == OK
    expected = {f"{name}-none-s{seed}" for name in ("badnets", "none") for seed in (0, 5)}
    assert set(records(place)) == expected
    assert f"no attack (clean control) · 5 % benign · {TOLD} · seeds 0, 5" in answer.out


def test_all_to_all(attack: Bench, place: Path) -> None:
    answer = attack("--defense", "none", "--all-to-all")
    assert answer.code == OK
    (record,) = records(place).values()
    assert record.cell.all_to_all
    assert record.before is not None
    assert record.before.triggered_count == 60  # every class has one to become
    assert "all-to-all" in answer.out


def test_quiet(attack: Bench) -> None:
    answer = attack("--defense", "none", "--quiet")
    assert (answer.code, answer.err) == (OK, "")
    assert "defense" in answer.out


def test_settings_reach_the_record(attack: Bench, place: Path) -> None:
    words = "--attack blend --defense none --set blend.alpha=1e-1 --target 2 --benign-fraction 0.1"
    attack(*words.split(), "--benign-source", "held_out", "--output", "elsewhere/deep")
    (file,) = (place / "elsewhere/deep/records").rglob("*.json")
    record = read_record(file)
    assert record.cell.attack["settings"] == {"alpha": 0.1}
    assert (record.cell.target, record.benign_count) == (2, 20)
    assert (record.cell.benign_fraction, record.cell.benign_source) == (0.1, "held_out")
    assert record.cell.recipe["settings"]["epochs"] == 1
    assert not (place / "results").exists()


def test_config_file_under_options(attack: Bench, place: Path) -> None:
    (place / "run.yaml").write_text(
        "attack: blend\ndefense: [none]\nseeds: [3, 4]\ntarget: 1\n"
        "set:\n  blend: {alpha: 5e-1}\n  mnist_fast: {epochs: 50, lr: 0.03}\n"
    )
    answer = attack("--config", "run.yaml", "--seeds", "7")
    assert answer.code == OK
    assert set(records(place)) == {"blend-none-s7"}
    cell = records(place)["blend-none-s7"].cell
    assert (cell.target, cell.attack["settings"]) == (1, {"alpha": 0.5})
    recipe = cell.recipe["settings"]
    assert (recipe["epochs"], recipe["lr"]) == (1, 0.03)  # the option's, the file's


def test_a_terminal_that_knows_no_arrows(attack: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert attack("--defense", "none").code == OK
    assert b"ASR % ?" in shown.getvalue()


# --- plug-ins of one's own ----------------------------------------------------------------------


def test_a_defense_of_ones_own(bench: Bench, attack: Bench, place: Path) -> None:
    """One file, no other edit: it is listed, run, tabled, and has settings."""
    (place / "mine.py").write_text(SHRINK)
    listed = bench("list", "--plugin", "mine.py")
    assert re.search("^  shrink +scale the last layer down.$", listed.out, re.MULTILINE)
    assert "[Nobody 2025]" in listed.out
    words = ("--plugin", "mine.py", "--defense", "none", "shrink")
    answer = attack(*words, "--set", "shrink.factor=0.25")
    assert answer.code == OK
    assert re.search(r"^shrink \(factor=0\.25\)[¹²] +[\d.]+ ", answer.out, re.MULTILINE)
    assert re.search(r"^[¹²] weak attack", answer.out, re.MULTILINE)
    assert records(place)["badnets-shrink-s0"].notes == {"factor": 0.25}
    assert attack(*words).cached == ["none"]
    refused(attack(*words, "--set", "shrink.factor=7"), r"defense shrink: factor must lie in")
    refused(attack(*words, "--set", "shrink.facter=1"), r"'facter'; did you mean 'factor'\?")
    refused(attack("--plugin", "mine.py", "--defense", "shrnk"), r"did you mean 'shrink'\?")


def test_a_plugin_without_a_docstring_is_listed(bench: Bench, place: Path) -> None:
    (place / "mine.py").write_text(FAULTY.format(deed="raise OSError"))
    listed = bench("list", "--plugin", "mine.py")
    assert re.search(r"^  faulty +$", listed.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("deed", "status", "error", "code"),
    [
        ("raise RuntimeError('out of\\nluck')", "failed", "RuntimeError: out of luck", FAILED),
        ("assert False", "failed", "AssertionError", FAILED),
        ("return None", "failed", "TypeError: purify returned NoneType", FAILED),
        ("return nn.Linear(2, 2)", "failed", "RuntimeError: ", FAILED),
        (
            "return nn.Sequential(model, nn.Threshold(1e9, float('nan')))",
            "diverged",
            "105 images",
            FAILED,
        ),
        ("raise NotApplicable('no such layer')", "skipped", "no such layer", OK),
    ],
    ids=["raises", "asserts", "nothing", "misfit", "NaN", "skips"],
)
def test_a_failing_defense(
    attack: Bench, place: Path, deed: str, status: str, error: str, code: int
) -> None:
    """The others' results stay; the exit code, the summary, the table and a record tell."""
    (place / "mine.py").write_text(FAULTY.format(deed=deed))
    words = ("--plugin", "mine.py", "--defense", "faulty", "none")
    answer = attack(*words)
    assert answer.code == code
    assert re.search(r"^none¹ +[\d.]+ ", answer.out, re.MULTILINE)
    assert re.search(r"^faulty² ", answer.out, re.MULTILINE)
    assert re.search(rf"^² {status}: {error}", answer.out, re.MULTILINE)
    told = f"{status}: badnets / faulty / seed 0: {error}"
    assert [told in answer.err, "1 of 2 cells did not finish\n" in answer.err] == [code != OK] * 2
    found = records(place)
    assert found["badnets-none-s0"].status == "ok"
    faulty = found["badnets-faulty-s0"]
    assert (faulty.status, faulty.after) == (status, None if status != "diverged" else faulty.after)
    assert faulty.error is not None
    assert faulty.error.startswith(error)
    assert f"] faulty: {status}: {error}" in answer.err
    assert faulty.before == found["badnets-none-s0"].before
    tried_again = status == "failed"
    assert attack(*words).cached == (["none"] if tried_again else ["faulty", "none"])


SLIPS = {
    "dataset": """\
@DATASETS.register("mine")
@dataclass(frozen=True)
class Mine(Dataset):
    def load(self, ctx):
        {deed}
""",
    "model": """\
@MODELS.register("mine")
@dataclass(frozen=True)
class Mine(Architecture):
    def build(self, task):
        {deed}
""",
    "attack": """\
@ATTACKS.register("mine")
@dataclass(frozen=True)
class Mine(PoisoningAttack):
    def make_trigger(self, shape, rng):
        {deed}
""",
    "defense": """\
@DEFENSES.register("mine")
@dataclass(frozen=True)
class Mine(Defense):
    needs = frozenset({deed})

    def purify(self, model, ctx):
        return model
""",
}


@pytest.mark.parametrize(
    ("kind", "deed", "message"),
    [
        ("dataset", "return {}['images']", r"/mine\.py, line 11: KeyError: 'images'"),
        ("dataset", "return None", "load returned NoneType, expected a Source"),
        ("dataset", "return Split(torch.zeros(3), torch.zeros(3))", "images must be .* got .3,. "),
        ("dataset", "raise SystemExit(3)", r"/mine\.py, line 11: SystemExit: 3"),
        (
            "dataset",
            "from purebench.data import Source\n        split = "
            "Split(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 2 + 1)\n"
            "        return Source(split, split, 3)",
            ": no training image of class 0; are labels numbered from 0",
        ),
        ("model", "return task.size", r"/mine\.py, line 11: AttributeError: .* 'size'"),
        ("model", "return len", "build returned builtin_function_or_method, expected a network"),
        (
            "model",
            "return nn.Identity()",
            r"gives \(2, 1, 16, 16\) for 2 images",
        ),
        ("model", "return nn.LSTM(16, 4)", "does not fit 1x16x16 images: LSTM"),
        ("model", "raise ValueError", "does not fit 1x16x16 images: ValueError"),
        ("attack", "return shape.side", r"/mine\.py, line 11: AttributeError: .* 'side'"),
        ("attack", "return len", "make_trigger returned builtin_function_or_method, expected"),
        ("attack", "raise ValueError('too small')", ": too small"),
        ("defense", "{'training-set'}", "nobody can give it 'training-set'; needs are of init, "),
    ],
)
def test_a_mistake_in_a_plugin(
    attack: Bench, place: Path, kind: str, deed: str, message: str
) -> None:
    """Told in one line, with the file's line where Python raised it, before anything is trained."""
    (place / "mine.py").write_text(
        "from dataclasses import dataclass\n\nimport torch\nfrom torch import nn\n\n"
        f"from purebench import *\n{SLIPS[kind].replace('{deed}', deed)}"
    )
    refused(attack("--plugin", "mine.py", f"--{kind}", "mine"), f"{kind} mine.*{message}")
    assert not (place / "results" / "models").exists()


def test_control_c(attack: Bench, place: Path) -> None:
    """What is finished stays, whole, and the same command goes on from there."""
    file = place / "mine.py"
    file.write_text(FAULTY.format(deed="raise KeyboardInterrupt"))
    words = ("--plugin", "mine.py", "--defense", "none", "faulty", "prune")
    answer = attack(*words)
    assert answer.code == INTERRUPTED == 130
    assert answer.err.endswith(
        "interrupted: finished cells are kept; the same command goes on from there\n"
    )
    assert "Traceback" not in answer.err
    assert {name: record.status for name, record in records(place).items()} == {
        "badnets-none-s0": "ok"
    }
    assert not list(place.rglob(".*"))  # files written aside
    file.write_text(FAULTY.format(deed="return model"))
    again = attack(*words)
    assert (again.code, again.cached) == (OK, ["none"])
    assert again.done == ["none", "faulty", "prune"]
    assert "training:" not in again.err


# --- list, doctor, help -------------------------------------------------------------------------


def test_list(bench: Bench) -> None:
    answer = bench("list")
    assert (answer.code, answer.err) == (OK, "")
    for registry in REGISTRIES:
        part = answer.out.partition(f"{registry.folder}:\n")[2]
        for name in registry.names():
            paper = re.escape(registry[name].paper)
            assert re.search(rf"^  {name} +\S.*\.\n +\[{paper}\]$", part, re.MULTILINE), name
    part = answer.out.partition("recipes:\n")[2]
    assert re.search(r"^  bb100 +100 epochs, batches of 128, lr 0.01, cosine$", part, re.MULTILINE)
    texts = re.findall(r"^(  \S* +)\S", answer.out, re.MULTILINE)
    assert len({*map(len, texts)}) == 1  # one column, however long the names are


def test_list_explains_what_is_named(bench: Bench, place: Path) -> None:
    answer = bench("list", "none", "clean_label", "bb100")
    assert (answer.code, answer.err) == (OK, "")
    found = [part.splitlines() for part in re.split(r"\n\n(?=\S)", answer.out)]
    titles = [lines[0].partition(":")[0] for lines in found]
    assert titles == ["none (attack)", "none (defense)", "clean_label (attack)", "bb100 (recipe)"]
    assert found[2][1] == "  [Turner et al. 2019, arXiv:1912.02771]"
    assert ["norm", "linf | l2", "l2"] in [re.split("  +", line)[1:] for line in found[2]]
    assert any(line.startswith("  eps: radius of the perturbation") for line in found[2])
    assert "\n  Feature shift tuning (FST) [Min et al." in bench("list", "fst").out
    assert ["flip", "bool", "true"] in [line.split() for line in found[3]]
    (place / "mine.py").write_text(FAULTY.format(deed="raise OSError"))
    assert bench("list", "faulty", "--plugin", "mine.py").out == "faulty (defense)\n"
    (place / "asks.py").write_text(
        FAULTY.replace("faulty", "asks")
        .format(deed="return model")
        .replace("class Faulty(Defense):", "class Asks(Defense):\n    eps: float\n")
    )
    refused(bench("list", "asks", "--plugin", "asks.py"), "defense asks: .*'eps'")


@pytest.mark.parametrize("registry", [ATTACKS, DEFENSES], ids=lambda registry: registry.folder)
def test_list_has_tables_for_documents(bench: Bench, registry: Registry[Any]) -> None:
    """Of everything but ``none``; what needs more than benign images says so."""
    answer = bench("list", "--table", registry.folder)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in answer.out.splitlines()]
    assert [row[0] for row in rows[2:]] == [f"`{name}`" for name in registry.names()
                                            if name != "none"]  # fmt: skip
    found = {row[0].strip("`"): row for row in rows[2:]}
    if registry is ATTACKS:
        assert found["clean_label"][3] == "0.5 of the class"
        assert found["blend"][3:] == [
            "0.1", "Chen et al. 2017, [arXiv:1712.05526](https://arxiv.org/abs/1712.05526)"
        ]  # fmt: skip
    else:
        assert found["abl"][1] == "Anti-backdoor learning (ABL)"
        assert found["abl"][3:5] == ["poisoned training set", ""]
        assert found["anp_oracle"][3] == "test split (a leak)"
        assert found["robust_recovery"][3:5] == ["", "yes"]
    refused(bench("list", "--table", registry.folder, "blend"), "--table is of all there are")


@pytest.fixture
def broken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack and a defense that cannot be imported."""
    for folder in ("attacks", "defenses"):
        package = importlib.import_module(f"purebench.{folder}")
        (place / folder).mkdir()
        (place / folder / "broken.py").write_text("import torch\ndef f(:\n")
        places = [*package.__path__, str(place / folder)]
        monkeypatch.setattr(package, "__path__", places)
        monkeypatch.setattr(package.__spec__, "submodule_search_locations", places)
    importlib.invalidate_caches()


def test_a_broken_plugin_is_told_in_its_row(bench: Bench, broken: None, place: Path) -> None:
    answer = bench("list")
    assert (answer.code, answer.err) == (OK, "")
    told = f"'broken' cannot be imported: {place}/defenses/broken.py, line 2: SyntaxError: "
    assert re.search(rf"^  broken +defense {re.escape(told)}.*\n  \w+ ", answer.out, re.MULTILINE)
    assert "shapes" in answer.out


def test_a_broken_plugin_ends_a_run_that_needs_it(attack: Bench, broken: None) -> None:
    """The default defenses are found by their classes."""
    assert attack("--defense", "none").code == OK
    for words in (["--defense", "broken"], ["--defense", "all"], []):
        refused(attack(*words), r"defense 'broken' .*/defenses/broken\.py, line 2: SyntaxError: .*")


def test_doctor(bench: Bench, place: Path) -> None:
    answer = bench("doctor", "--device", "cpu")
    assert (answer.code, answer.err) == (OK, "")
    assert f"torch        {torch.__version__.split('+')[0]}" in answer.out
    assert "yes: two trainings, equal bits" in answer.out
    assert answer.out.endswith("all well\n")
    (place / "taken").touch()
    answer = bench("doctor", "--output", "taken", "--device", "cpu")
    assert answer.code == FAILED
    assert "cannot write to the output folder taken" in answer.out


def test_doctor_knows_damaged_data(
    bench: Bench, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mnist = importlib.import_module("purebench.datasets.mnist")
    (place / "mnist.xz").write_bytes(mnist.FILE.read_bytes()[:-9])
    monkeypatch.setattr(mnist, "FILE", place / "mnist.xz")
    answer = bench("doctor", "--device", "cpu")
    assert answer.code == FAILED
    assert re.search(r"^mnist +\S*mnist\.xz: damaged: sha256 is ", answer.out, re.MULTILINE)
    assert answer.out.endswith("something is missing, see above\n")


def test_doctor_tells_what_is_optional(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each package of an extra that is for more than developing."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r'^(page|figures|ray|slurm) = \["([\w-]+)', text, re.MULTILINE)
    assert {package: extra for extra, package in extras} == doctor.OPTIONAL

    def version(package: str) -> str:
        if package != "ray":
            return "1.2.3"
        raise PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", version)
    answer = bench("doctor", "--device", "cpu")
    assert answer.code == OK
    assert "\njinja2       1.2.3\n" in answer.out
    assert '\nray          not installed (pip install -e ".[ray]")\n' in answer.out


def test_show(attack: Bench, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the network that a run has trained, and the same picture each time."""
    small = [f"--set={key}={value}" for key, value in TINY.items()]
    words = ["show", "--attack", "badnets", "--dataset", "shapes", *small]
    attack("--defense", "none")
    file = place / "results" / "figures" / "badnets-s0.png"
    pictures = []
    with monkeypatch.context() as patched:
        patched.setattr(PoisoningAttack, "run", lambda *_: pytest.fail("trained again"))
        for _ in range(2):
            assert main(words) == OK
            pictures.append(file.read_bytes())
    assert pictures[0] == pictures[1]
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert image.height > image.width / 2
    assert not file.with_name("overview-s0.png").exists()
    assert main(["show", "--attack", "badnets", "blend", *words[3:]]) == OK
    assert file.with_name("overview-s0.png").exists()


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_show_tells_what_fails(
    bench: Bench, place: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def run(attack: PoisoningAttack, *_: object) -> None:
        raise kind(f"{attack.name}\nbroke")

    monkeypatch.setattr(PoisoningAttack, "run", run)
    small = [f"--set={key}={value}" for key, value in TINY.items()]
    answer = bench("show", "--attack", "blend", "badnets", "--dataset", "shapes", *small)
    assert (answer.code, answer.out) == (FAILED, "")
    assert answer.err == "".join(
        f"failed: {name} / seed 0: {kind.__name__}: {name} broke\n" for name in ("blend", "badnets")
    )


def test_no_arguments_mean_help(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    answer = bench()
    assert (answer.code, answer.err) == (OK, "")
    assert answer.out.startswith("usage: bench.py")
    assert "python bench.py --attack blend" in answer.out
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out == answer.out


@pytest.mark.parametrize(("word", "unbuffered"), [("--help", ""), ("--version", ""), ("list", "1")])
def test_a_reader_that_has_gone(word: str, unbuffered: str) -> None:
    """``bench.py ... | head -1``: noticed when the output ends, or at once."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "bench.py", word],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (OK, "")


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lits"], r"unknown command 'lits'; did you mean 'list'\?"),
        (
            ["blend"],
            r"unknown command 'blend'; known: doctor, evaluate, leaderboard, list",
        ),
        (["--atack", "blend"], r"unknown option '--atack'; did you mean '--attack'\?"),
        (["--seed=3"], r"unknown option '--seed'; did you mean '--seeds'\?"),
        (["list", "--plug", "x.py"], r"unknown option '--plug'; did you mean '--plugin'\?"),
        (["list", "blend", "blen"], r"unknown name 'blen'; did you mean 'blend'\?"),
        (["list", "zzz"], r"unknown name 'zzz'; known: abl(, \w+){11} and \d+ more"),
        (["show"], "name at least one attack: "),
        (["show", "--attack", "blen"], r"unknown attack 'blen'; did you mean 'blend'\?"),
        (["show", "--attack", "blend", "--defense", "none"], "unknown option '--defense'"),
        (["doctor", "--attack", "blend"], "unknown option '--attack'"),
        (["--quiet", "blend"], "unexpected 'blend': it belongs to no option"),
        (["--attack"], "argument --attack: expected at least one argument"),
        (["--target"], "argument --target: expected one argument"),
        (["--dataset", "shapes"], "name at least one attack: .*badnets, blend"),
        (["--config", "nowhere.yaml"], r"cannot read nowhere\.yaml: No such file or directory"),
        (["list", "--plugin", "nowhere.py"], r"--plugin 'nowhere\.py': no such file"),
        (["doctor", "--device", "tpu"], "unknown device 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words(bench: Bench, place: Path, words: list[str], message: str) -> None:
    answer = bench(*words)
    refused(Answer(answer.code, "" if words[0] == "doctor" else answer.out, answer.err), message)
    assert untrained(place)


NO_CUDA = f"device 'cuda:{torch.cuda.device_count()}' is not there: torch .* sees"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # names
        ("--attack blen", r"unknown attack 'blen'; did you mean 'blend'\?"),
        ("--attack badnets blen", r"unknown attack 'blen'; did you mean 'blend'\?"),
        ("--defense finetune", r"unknown defense 'finetune'; did you mean 'fine_tune'\?"),
        ("--model smal_cnn", r"unknown model 'smal_cnn'; did you mean 'small_cnn'\?"),
        ("--dataset shape", r"unknown dataset 'shape'; did you mean 'shapes'\?"),
        ("--recipe mnist_fats", r"unknown recipe 'mnist_fats'; did you mean 'mnist_fast'\?"),
        ("--attack ../x", r"unknown attack '\.\./x'; known: "),
        ("--defense x/yy", "unknown defense 'x/yy'; known: "),
        ("--model ../small_cnn", r"unknown model '\.\./small_cnn'; did you mean 'small_cnn'"),
        ("--dataset /etc/passwd", "unknown dataset '/etc/passwd'; known: "),
        ("--attack _masks", "unknown attack '_masks'"),
        # settings
        ("--attack blend --set blend.alfa=1", r"attack blend has no setting 'alfa'; .*'alpha'\?"),
        ("--attack blend --set blend.alpha=7", r"attack blend: alpha must lie .*, got 7\.0"),
        ("--attack blend --set blend.alpha=x", "attack blend: alpha must be a number, got 'x'"),
        ("--attack blend --set blend.alpha=nan", "alpha must be a number, got 'nan'"),
        ("--set blend.alpha=0.1", "'blend' is no part of this run"),
        ("--set badnest.size=3", r"'badnest' is no part of this run; did you mean 'badnets'\?"),
        ("--set alpha=0.1", r"--set 'alpha=0\.1' must have the form NAME\.KEY=VALUE"),
        ("--set prune.budget=2 --defense prune", "defense prune: budget must be .*, got 2"),
        ("--set mnist_fast.epochs=1.5", "recipe mnist_fast: epochs must be a whole number"),
        ("--set mnist_fast.lr=1 mnist_fast.lr=2", r"--set gives mnist_fast\.lr twice"),
        ("--set mnist_fast.lr=-1", "recipe mnist_fast: lr must not be negative"),
        ("--set mnist_fast.precision=bf16", "precision bf16 is for CUDA"),
        ("--set mnist_fast.precision=fp16", "precision must be one of fp32, tf32, bf16"),
        ("--set shapes.size=4", "dataset shapes: size must be at least 12, got 4"),
        ("--set shapes.size=12", "model small_cnn does not fit 1x12x12 images: .*16x16"),
        ("--model one_hidden --set one_hidden.patch=5", "does not fit 1x16x16 images: .*patch 5"),
        # the attack's aim
        ("--target 4", "target class 4 does not exist: the dataset has classes 0 to 3"),
        ("--target -1", "target class -1 does not exist"),
        ("--target one", "--target must be a whole number, got 'one'"),
        ("--poison-rate 0", "poison rate 0.0 poisons 0 of the 200 training images"),
        ("--poison-rate 0.001", "poison rate 0.001 poisons 0 of the 200 training images"),
        ("--poison-rate 1.5", "poison rate 1.5 poisons 300 of the 200 training images"),
        ("--poison-rate -0.1", "poison rate -0.1 poisons 0 of"),
        ("--poison-rate 1e308", r"poison rate 1e\+308 poisons \d+ of the 200 training images"),
        ("--poison-rate nan", "--poison-rate must be a number, got 'nan'"),
        ("--benign-fraction 0", "benign fraction must lie between 0 and 1, got 0.0"),
        ("--benign-fraction 0.01", "leaves the defender 2; it needs at least 2 a class, 8"),
        # the run
        ("--seeds 1 1", "--seeds names 1 twice"),
        ("--seeds 0 --seeds 0", "--seeds names 0 twice"),
        ("--seeds -1", "--seeds must not be negative, got -1"),
        ("--attack badnets badnets", "--attack names badnets twice"),
        ("--device tpu", "unknown device 'tpu'; known: auto, cpu, cuda, cuda:N"),
        (f"--device cuda:{torch.cuda.device_count()}", NO_CUDA),
        ("--threads 0", "--threads must be at least 1"),
        ("--plugin nowhere.py", r"--plugin 'nowhere\.py': no such file"),
        ("--plugin taken", "--plugin 'taken': not a Python file"),
        ("--output taken", "cannot write to the output folder taken/models: Not a directory"),
        (
            "--output taken/deep",
            "cannot write to the output folder taken/deep/models: Not a directory",
        ),
        ("--output=", "--output must name a folder, got ''"),
        ("--output checkout", "--output checkout is the checkout itself: name another folder"),
        # files
        ("--dataset npz", r"npz needs to know where your data is: --set npz\.path=FILE\.npz"),
        ("--dataset npz --set npz.path=no.npz", r"npz\.path no\.npz: no such file"),
        ("--dataset npz --set npz.path=taken", "taken: not a readable .npz"),
        ("--dataset image_folder --set image_folder.path=taken", "taken: not a folder"),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_bad_options(attack: Bench, place: Path, words: str, message: str) -> None:
    (place / "taken").touch()
    (place / "checkout" / "purebench").mkdir(parents=True)
    (place / "checkout" / "bench.py").touch()
    refused(attack(*words.split()), message)
    assert untrained(place)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.png", r"cannot read nowhere\.png: No such file or directory"),
        ("taken", "taken is not an image that can be read"),
        ("cut.png", r"cut\.png is not an image that can be read"),
        ("clear.png", r"clear\.png has mode RGBA; save it as grey or RGB"),
        ("tall.png", r"tall\.png is 16x17 grey, the dataset's images are 16x16 grey"),
        ("colour.png", r"colour\.png is 16x16 RGB, the dataset's images are 16x16 grey"),
    ],
)
def test_a_pattern_that_will_not_do(attack: Bench, place: Path, name: str, message: str) -> None:
    (place / "taken").touch()
    for file, mode, height in (("tall", "L", 17), ("colour", "RGB", 16), ("clear", "RGBA", 16)):
        Image.new(mode, (16, height)).save(place / f"{file}.png")
    (place / "cut.png").write_bytes((place / "tall.png").read_bytes()[:-30])
    words = ("--attack", "blend", "--set", f"blend.pattern={name}")
    refused(attack(*words), f"attack blend: (pattern: )?{message}")
    assert untrained(place)


def test_a_pattern_of_ones_own(attack: Bench, place: Path) -> None:
    """Its file's digest tells one victim from another; where the file lies does not."""
    words = ("--attack", "blend", "--defense", "none")
    assert attack(*words).cached == []
    Image.new("L", (16, 16), 255).save(place / "white.png")
    Image.new("L", (16, 16), 0).save(place / "black.png")
    assert attack(*words, "--set", "blend.pattern=white.png").cached == []
    digest = hashlib.sha256((place / "white.png").read_bytes()).hexdigest()
    settings = [record.cell.attack["settings"] for record in every_record(place)]
    assert sorted(settings, key=len) == [
        {"alpha": 0.2}, {"alpha": 0.2, "pattern": f"sha256:{digest}"},
    ]  # fmt: skip
    (place / "white.png").rename(place / "moved.png")
    assert attack(*words, "--set", "blend.pattern=moved.png").cached == ["none"]
    assert attack(*words, "--set", "blend.pattern=black.png").cached == []
    assert attack(*words).cached == ["none"]


# What each attack refuses before training: more than there is, and what it is not defined for.
RATES = {"bpp": 0.6, "wanet": 0.4, "adaptive_blend": 0.6, "input_aware": 0.6}  # with cover images


@pytest.mark.parametrize("name", [name for name in ATTACKS.names() if name != "none"])
def test_what_no_attack_can_do(attack: Bench, place: Path, name: str) -> None:
    words = ("--attack", name, "--defense", "none")
    for rate in (0, -0.1, 1.1, 1e-9, RATES.get(name, 1.01)):
        refused(attack(*words, "--poison-rate", str(rate)), f"poison rate {float(rate)} .*{name}")
    for target in (-1, 4):
        refused(attack(*words, "--target", str(target)), f"target class {target} does not exist")
    if not ATTACKS[name].all_to_all:
        refused(attack(*words, "--all-to-all"), f"attack {name} is not defined all-to-all")
    assert untrained(place)


def test_attacks_not_defined_all_to_all() -> None:
    defined = {name: ATTACKS[name].all_to_all for name in ATTACKS.names()}
    assert not defined["sig"]
    assert not defined["clean_label"]
    assert defined["badnets"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atack: blend", r"run\.yaml, line 1: unknown key 'atack'; did you mean 'attack'\?"),
        ("attack: blend\nattack: none", r"run\.yaml, line 2: duplicate key 'attack'"),
        ("attack: blend\nseeds: !!python/object:os.system 1", r"run\.yaml, line 2: tag .* is not"),
        ("attack: blend\ntarget: one", r"run\.yaml, line 2: target must be a whole number"),
        ("- attack", r"run\.yaml, line 1: expected 'key: value' lines"),
        ("attack: [blend", r"run\.yaml, line 1: expected ',' or '\]'"),
        (
            "attack: blend\nset:\n  blend:\n    alfa: 1",
            r"run\.yaml, line 4: attack blend has no setting 'alfa'; did you mean 'alpha'\?",
        ),
        (
            "attack: blend\nset:\n  blend:\n    alpha: x",
            r"run\.yaml, line 4: attack blend: alpha must be a number, got 'x'",
        ),
        (
            "attack: blend\nset:\n  blend:\n    alpha: 3",
            r"run\.yaml, line 4: attack blend: alpha must lie between 0 and 1, got 3",
        ),
        ("attack: blen", r"unknown attack 'blen'; did you mean 'blend'\?"),
        ("attack: ../x", r"unknown attack '\.\./x'"),
    ],
)
def test_bad_config(attack: Bench, place: Path, text: str, message: str) -> None:
    (place / "run.yaml").write_text(text)
    refused(attack("--config", "run.yaml"), message)
    assert untrained(place)


@pytest.mark.parametrize("label", [-100, 4])
def test_labels_that_are_no_class(attack: Bench, place: Path, label: int) -> None:
    labels = np.arange(40) % 4
    labels[7] = label
    images = np.zeros((40, 16, 16), np.uint8)
    np.savez(place / "mine.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    words = ("--dataset", "npz", "--set", "npz.path=mine.npz", "npz.num_classes=4")
    refused(attack(*words), rf"mine\.npz: y_train: 1 labels outside 0\.\.3: {label} \(1\); .* 7")
    assert untrained(place)


def test_images_of_mixed_sizes(attack: Bench, place: Path) -> None:
    for part, name in ((part, name) for part in ("train", "test") for name in ("cat", "dog")):
        folder = place / "mine" / part / name
        folder.mkdir(parents=True)
        for number in range(10):
            Image.new("L", (16, 16)).save(folder / f"{number}.png")
    Image.new("L", (16, 20)).save(place / "mine/train/dog/5.png")
    words = ("--dataset", "image_folder", "--set", "image_folder.path=mine")
    refused(attack(*words), r"mixed sizes: 39 are 16x16, 1 are not: train/dog/5\.png \(16x20\)")
    assert untrained(place)


def test_no_cuda_here(attack: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(attack("--device", "cuda"), "device 'cuda' is not there: torch .* sees 0 CUDA devices")
