"""The source keeps the design: imports point down the floors, and nothing is ever unpickled."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from purebench.commands import COMMANDS

ROOT = Path(__file__).parent.parent
PLUGINS = ("attacks", "defenses", "models", "datasets")

# A module imports what is on its own floor or below. A new one gets its floor here.
FLOORS = {
    **dict.fromkeys(("errors", "registry", "settings", "seeding", "storage", "progress"), 0),
    **dict.fromkeys(("heatmap", "picture", "interrupt", "scores"), 0),
    **dict.fromkeys(("data", "model", "attack", "defense", "layers", "training", "evaluate"), 1),
    **dict.fromkeys(("recovery", "stealth", "reactivation", "adversarial", "savepoint"), 1),
    **dict.fromkeys(("config", "machine", "artifact", "record", "runner", "contract"), 2),
    **dict.fromkeys(("study", "contamination", "submission", "gallery", "sweep", "checkpoint"), 3),
    **dict.fromkeys(("purification", "examination", "forecast", "executors"), 3),
    "worker": 0,
    **dict.fromkeys(PLUGINS, 3),
    **dict.fromkeys(("leaderboards", "commands", "doctor"), 4),
    "cli": 5,
}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base", "core"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "exec"),
}
TORCH_FILES = "purebench.checkpoint"  # may read them, as tensors alone
FILES = sorted(
    file.relative_to(ROOT)
    for folder in ("purebench", *PLUGINS, "leaderboards", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)


def parse(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text("utf-8"), str(file))


def module_name(file: Path) -> str:
    """As it is imported: attacks/blend.py is purebench.attacks.blend."""
    parts = file.with_suffix("").parts
    if parts[0] not in ("purebench", "benchmarks"):
        parts = ("purebench", *parts)
    return ".".join(parts)


def imports(tree: ast.Module, module: str) -> Iterator[str]:
    """What ``module`` imports when it runs, as dotted names; ``from a import b`` gives a.b."""
    hidden = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            home = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{home}.{alias.name}" for alias in node.names)


def wrong_imports(tree: ast.Module, module: str) -> Iterator[str]:
    """What the floors do not allow, each with the reason."""
    own, *rest = module.split(".")
    place = rest[0] if own == "purebench" and rest else own
    for name in imports(tree, module):
        top, *below = name.split(".")
        target = below[0] if below else ""
        if top in (*PLUGINS, "leaderboards"):
            yield f"{name}: a plug-in folder is only ever purebench.{top}"
        if top != "purebench" or place == "benchmarks" or target == place:
            continue
        if target in PLUGINS:
            yield f"{name}: plug-ins are reached through the registry"
        elif target in FLOORS and FLOORS[target] > FLOORS.get(place, 0):
            yield f"{name}: floor {FLOORS[target]} is above {place}"
        elif place == "leaderboards" and FLOORS.get(target, 0) > 1 and target != "record":
            yield f"{name}: leaderboards see records and what is under them"
        elif place in PLUGINS and target in ("config", "runner", "record", "artifact"):
            yield f"{name}: no plug-in knows how it is run"


def reads_tensors_alone(call: ast.Call) -> bool:
    """torch.load(..., weights_only=True), and nothing that could make it otherwise."""
    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
    plain = len(call.args) == 1 and set(words) <= {"map_location", "weights_only"}
    return ast.unparse(call.func) == "torch.load" and plain and words.get("weights_only") == "True"


def dangers(tree: ast.Module, module: str) -> Iterator[str]:
    """What could execute a file's content."""
    for name in imports(tree, module):
        if name.split(".")[0] in UNPICKLERS or name in LOADERS:
            yield name
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in LOADERS and not (module == TORCH_FILES and reads_tensors_alone(node)):
            yield name
        pickles = [ast.unparse(word.value) for word in node.keywords if word.arg == "allow_pickle"]
        if (pickles or name in ("np.load", "numpy.load")) and pickles != ["False"]:
            yield f"{name} without allow_pickle=False"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_down(file: Path) -> None:
    assert not list(wrong_imports(parse(file), module_name(file)))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("purebench.settings", "from .data import Split"),
        ("purebench.errors", "from . import settings, runner"),
        ("purebench.data", "def late():\n    from purebench.record import Record"),
        ("purebench.recovery.l1", "from ..runner import Plan"),
        ("purebench.runner", "from .cli import main"),
        ("purebench.runner", "from .attacks.blend import Blend"),
        ("purebench.runner", "import purebench.leaderboards.table"),
        ("purebench.cli", "import purebench.defenses"),
        ("purebench.commands.run", "from ..cli import OK"),
        ("purebench.runner", "from .commands import OK"),
        ("purebench.runner", "import datasets"),
        ("purebench.attacks.blend", "from models.lenet import LeNet"),
        ("purebench.attacks.blend", "from purebench.models.lenet import LeNet"),
        ("purebench.attacks.blend", "from ..defenses.prune import Prune"),
        ("purebench.defenses.prune", "from purebench.runner import execute"),
        ("purebench.datasets.mnist", "from purebench.cli import main"),
        ("purebench.leaderboards.table", "from purebench.runner import Plan"),
        ("purebench.leaderboards.table", "from purebench.artifact import load_artifact"),
        ("benchmarks.pipeline", "import datasets.mnist"),
    ],
)
def test_imports_that_point_up_are_seen(module: str, line: str) -> None:
    assert len(list(wrong_imports(ast.parse(line), module))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("purebench.registry", "if TYPE_CHECKING:\n    from .attack import Attack"),
        ("purebench.runner", "from . import machine\nimport torch\nfrom .data import Split"),
        ("purebench.attacks.blend", "from purebench import ATTACKS\nfrom ._masks import mask"),
        ("purebench.defenses.prune", "from purebench.layers import weight_layers"),
        ("purebench.leaderboards.table", "from purebench.record import Record\nfrom . import page"),
    ],
)
def test_imports_that_point_down_are_allowed(module: str, line: str) -> None:
    assert not list(wrong_imports(ast.parse(line), module))


def test_every_command_is_a_module_of_its_name() -> None:
    """And says what it is for, as --help wants it: 'word ARGUMENTS: text.'"""
    files = {file.stem: file for file in FILES if file.parts[:2] == ("purebench", "commands")}
    assert {name for name in files if not name.startswith("_")} == set(COMMANDS)
    for name in COMMANDS:
        told = (ast.get_docstring(parse(files[name])) or "").partition("\n\n")[0]
        assert re.fullmatch(rf"{name}( [A-Z.a-z]+)*: \S.*\.", told, re.DOTALL), told


def test_every_module_has_a_floor() -> None:
    found = {file.parts[1].removesuffix(".py") for file in FILES if file.parts[0] == "purebench"}
    assert found - {"__init__"} <= set(FLOORS)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_modules_have_telling_names(file: Path) -> None:
    assert not VAGUE & {part.strip("_") for part in file.with_suffix("").parts}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_unpickles(file: Path) -> None:
    assert not list(dangers(parse(file), module_name(file)))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "def late():\n    import joblib",
        "from torch import load",
        "torch.load(file)",
        "torch.load(file, weights_only=True)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "np.load(file, allow_pickle=trusted)",
        "read(file, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "eval(text)",
    ],
)
def test_unpicklers_are_seen(line: str) -> None:
    assert len(list(dangers(ast.parse(line), "purebench.artifact"))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=trusted)",
        "torch.load(file, None, pickle_module, weights_only=True)",
        "torch.load(file, weights_only=True, **more)",
        "torch.jit.load(file, weights_only=True)",
        "from torch import load",
    ],
)
def test_checkpoints_are_read_as_tensors_alone(line: str) -> None:
    assert len(list(dangers(ast.parse(line), TORCH_FILES))) == 1


def test_one_module_reads_torch_files() -> None:
    """The exception is that line, and no more."""
    line = ast.parse("torch.load(file, map_location='cpu', weights_only=True)")
    assert not list(dangers(line, TORCH_FILES))
    calls = [
        module_name(file)
        for file in FILES
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls == [TORCH_FILES]


@pytest.mark.parametrize(
    "line",
    ["np.load(file, allow_pickle=False)", "model.eval()", "json.load(file)", "load(content)"],
)
def test_safe_readers_are_allowed(line: str) -> None:
    assert not list(dangers(ast.parse(line), "purebench.artifact"))


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file.parts[0] in PLUGINS and file.stem != "__init__"],
    ids=str,
)
def test_a_plugin_says_what_it_does(file: Path) -> None:
    """'Name: sentence.' is what ``list`` shows."""
    first = " ".join((ast.get_docstring(parse(file)) or "").partition("\n\n")[0].split())
    assert re.fullmatch(r"[A-Z0-9][^:.]*: \S.*\.", first), first


def test_tables_and_figures_are_made_without_torch() -> None:
    """It takes seconds to import."""
    code = """
import sys
from purebench.leaderboards import board, figures, page
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
