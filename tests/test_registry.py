"""Plug-ins are found by being there, imported when asked for, and refused when names clash."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import purebench
import purebench.registry
from purebench import DEFENSES, Attack, UsageError
from purebench.errors import near_match
from purebench.registry import REGISTRIES, Registry, load_plugin
from purebench.settings import build

ROOT = Path(__file__).parent.parent

SCREW = '''\
"""Screw: holds things together."""

from __future__ import annotations

from dataclasses import dataclass

from purebench import registry


@registry.{registry}.register("{name}")
@dataclass(frozen=True)
class Screw:
    pitch: float = 0.5
'''


def source(name: str = "screw", registry: str = "GADGETS") -> str:
    return SCREW.format(name=name, registry=registry)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """What a test imports is gone after it."""
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if "gadget" in name or "plugin" in name:
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the plug-ins of ``gadgets``, empty."""
    folder = tmp_path / "gadgets"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.setattr(purebench, "__path__", [*purebench.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    return folder


@pytest.fixture
def gadgets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    registry: Registry[Any] = Registry("gadget", "gadgets", "builtins:object")
    monkeypatch.setattr(purebench.registry, "GADGETS", registry, raising=False)
    monkeypatch.setattr(purebench.registry, "REGISTRIES", (*REGISTRIES, registry))
    return registry


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """install(package, name, target): a distribution with one entry point."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(package: str, name: str, target: str) -> None:
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[purebench.gadgets]\n{name} = {target}\n")
        (site / f"{package}.py").write_text(source(name))
        importlib.invalidate_caches()

    return install


def test_a_file_is_a_plugin(folder: Path, gadgets: Registry[Any]) -> None:
    assert gadgets.names() == ()
    (folder / "screw.py").write_text(source())
    (folder / "nail.py").write_text(source("nail"))
    importlib.invalidate_caches()
    assert gadgets.names() == ("nail", "screw")
    assert "purebench.gadgets.screw" not in sys.modules
    assert gadgets["screw"]().pitch == 0.5
    assert gadgets["screw"].name == "screw"
    assert gadgets["screw"] is gadgets["screw"]
    assert "screw" in gadgets
    assert "bolt" not in gadgets


def test_files_with_an_underscore_are_no_plugins(folder: Path, gadgets: Registry[Any]) -> None:
    (folder / "_thread.py").write_text(source("_thread"))
    assert gadgets.names() == ()
    with pytest.raises(UsageError, match="unknown gadget '_thread'"):
        gadgets["_thread"]


def test_a_folder_that_is_not_there_has_no_plugins() -> None:
    assert Registry[Any]("gizmo", "gizmos", "builtins:object").names() == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scew", "unknown gadget 'scew'; did you mean 'screw'?"),
        ("SCREW", "unknown gadget 'SCREW'; did you mean 'screw'?"),
        ("fine-tune", "unknown gadget 'fine-tune'; did you mean 'fine_tune'?"),
        ("zzz", "unknown gadget 'zzz'; known: fine_tune, screw"),
        ("../screw", "unknown gadget '../screw'; did you mean 'screw'?"),
        ("a/b", "unknown gadget 'a/b'; known: fine_tune, screw"),
        ("", "unknown gadget ''; known: fine_tune, screw"),
    ],
)
def test_unknown_names(folder: Path, gadgets: Registry[Any], name: str, message: str) -> None:
    for known in ("screw", "fine_tune"):
        (folder / f"{known}.py").write_text(source(known))
    with pytest.raises(UsageError) as refusal:
        gadgets[name]
    assert str(refusal.value) == message


def test_of_many_known_names_a_dozen_is_told() -> None:
    names = [f"name{number:02}" for number in range(40)]
    assert near_match("zzz", names[:12]) == f"; known: {', '.join(names[:12])}"
    assert near_match("zzz", names) == f"; known: {', '.join(names[:12])} and 28 more"


@pytest.mark.parametrize("text", ["", source("nail")])
def test_a_file_registers_its_own_name(folder: Path, gadgets: Registry[Any], text: str) -> None:
    (folder / "screw.py").write_text(text)
    with pytest.raises(UsageError, match="'screw' registers no class under that name"):
        gadgets["screw"]


def test_a_file_that_registers_other_names(folder: Path, gadgets: Registry[Any]) -> None:
    (folder / "screw.py").write_text(source("nail"))
    with pytest.raises(UsageError) as refusal:
        gadgets["screw"]
    assert str(refusal.value) == (
        "the gadget plug-in 'screw' registers no class under that name, but gadget 'nail'"
    )


BROKEN = {
    "syntax": ("x = 1\ndef f(:\n", ", line 2: SyntaxError: invalid syntax"),
    "import": (
        "\nimport nothing_of_that_name\n",
        ", line 2: ModuleNotFoundError: No module named 'nothing_of_that_name'",
    ),
    "below its class": (f"{source()}\n\n1 / 0\n", ", line 16: ZeroDivisionError: division by zero"),
    "exit": ("import sys\nsys.exit(3)\n", ", line 2: SystemExit: 3"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_with_its_line(
    folder: Path, gadgets: Registry[Any], kind: str
) -> None:
    """Each time that it is asked for, and by nobody else."""
    text, message = BROKEN[kind]
    (folder / "screw.py").write_text(text)
    (folder / "nail.py").write_text(source("nail"))
    importlib.invalidate_caches()
    for _ in range(2):
        with pytest.raises(UsageError) as refusal:
            gadgets["screw"]
        told = f"gadget 'screw' cannot be imported: {folder / 'screw.py'}{message}"
        assert str(refusal.value) == told
    assert gadgets["nail"]().pitch == 0.5


@pytest.mark.parametrize("name", ["Screw", "a b", "a-b", "../a", "1a", "_a", "", "é", "a\n"])
def test_names_are_plain(gadgets: Registry[Any], name: str) -> None:
    with pytest.raises(UsageError, match="must be lower-case letters, digits and underscores"):
        gadgets.register(name)


def test_a_class_of_another_kind_is_refused() -> None:
    @dataclass(frozen=True)
    class Mine(Attack):
        """Abstract, which does not matter here."""

    for cls in (Mine, type("Mine", (), {})):
        with pytest.raises(UsageError) as refusal:
            DEFENSES.register("mine")(cls)
        assert str(refusal.value) == (
            "defense 'mine': Mine is not derived from purebench.defense.Defense"
        )
    assert "mine" not in DEFENSES


def test_a_class_that_only_inherits_from_a_dataclass_is_refused(gadgets: Registry[Any]) -> None:
    """Its fields would be no settings."""
    screw: type[Any] = dataclass(frozen=True)(type("Screw", (), {}))
    for base in (object, screw):
        with pytest.raises(
            UsageError, match=r"Bolt needs @dataclass\(frozen=True\), below the line"
        ):
            gadgets.register("bolt")(type("Bolt", (base,), {}))
    assert "bolt" not in gadgets


@pytest.mark.parametrize("taken", ["rate", "revision"])
def test_a_setting_with_the_name_of_something_else_is_refused(
    gadgets: Registry[Any], taken: str
) -> None:
    """Its records could not be read."""
    nut: type[Any] = type("Nut", (), {"__annotations__": {taken: float}, taken: 0.1})
    with pytest.raises(UsageError, match=f"gadget 'nut': a setting cannot be named '{taken}'"):
        gadgets.register("nut")(dataclass(frozen=True)(nut))
    with pytest.raises(UsageError, match="at most 64"):
        gadgets.register("n" * 65)
    assert "nut" not in gadgets


def test_plugin_file(tmp_path: Path, gadgets: Registry[Any]) -> None:
    """Annotations that are text need the module to be found by its name."""
    file = tmp_path / "my-screw.v2.py"
    file.write_text(source())
    load_plugin(file)
    assert gadgets.names() == ("screw",)
    assert build(gadgets["screw"], {"pitch": "2"}, "x").pitch == 2.0
    load_plugin(str(file))  # the same file again is no other plug-in


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r": no such file$"),
        ("", r" registers nothing, see CONTRIBUTING\.md$"),
        ("import nothing_of_that_name", r", line 1: ModuleNotFoundError: No module named"),
        ("x = 1\ny = x / 0\n", r", line 2: ZeroDivisionError: division by zero$"),
        ("def f(:\n", r", line 1: SyntaxError: invalid syntax$"),
        ("raise SystemExit(3)", r", line 1: SystemExit: 3$"),
        ("raise ValueError('a\\n\\nb')", r", line 1: ValueError: a b$"),
        (source("No"), r"^gadget name 'No' must be lower-case"),
        (b"\xff\xfe", r": SyntaxError: "),
    ],
)
def test_plugin_file_refused(
    tmp_path: Path, gadgets: Registry[Any], text: str | bytes | None, message: str
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = set(sys.modules)
    with pytest.raises(UsageError, match=message) as refusal:
        load_plugin(file)
    assert "\n" not in str(refusal.value)
    assert repr(str(file)) in str(refusal.value) or "'No'" in str(refusal.value)
    assert text == "" or not {name for name in set(sys.modules) - before if "plugin" in name}


@pytest.mark.parametrize("name", ["mine.txt", "mine"])
def test_plugin_file_is_python(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x = 1")
    with pytest.raises(UsageError, match="not a Python file"):
        load_plugin(tmp_path / name)


def test_plugin_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_plugin(tmp_path)


def test_two_plugin_files_of_one_name(tmp_path: Path, gadgets: Registry[Any]) -> None:
    files = [tmp_path / place / "screw.py" for place in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text(source())
    load_plugin(files[0])
    with pytest.raises(UsageError) as refusal:
        load_plugin(files[1])
    assert str(refusal.value) == f"two gadgets are named 'screw': {files[0]} and {files[1]}"


def test_a_plugin_file_replaces_no_plugin_of_the_folder(
    tmp_path: Path, folder: Path, gadgets: Registry[Any]
) -> None:
    """Neither one that has been imported nor one that has not."""
    mine = tmp_path / "mine.py"
    mine.write_text(source())
    (folder / "screw.py").write_text(source())
    importlib.invalidate_caches()
    for _ in range(2):
        with pytest.raises(UsageError, match=r"two gadgets are named 'screw': .* and .*mine\.py"):
            load_plugin(mine)
        assert gadgets["screw"].__module__ == "purebench.gadgets.screw"


def test_entry_points(gadgets: Registry[Any], install: Callable[..., None]) -> None:
    install("gadget_shop", "screw", "gadget_shop:Screw")
    assert gadgets.names() == ("screw",)
    assert "gadget_shop" not in sys.modules
    assert gadgets["screw"].__module__ == "gadget_shop"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "gadget_mall",
            "gadget 'screw' (gadget_mall) of gadget_shop cannot be imported: "
            "ModuleNotFoundError: No module named 'gadget_mall'",
        ),
        (
            "gadget_shop:Nut",
            "gadget 'screw' (gadget_shop:Nut) of gadget_shop cannot be imported: "
            "AttributeError: module 'gadget_shop' has no attribute 'Nut'",
        ),
        ("json", "the gadget plug-in 'screw' registers no class under that name"),
    ],
)
def test_entry_points_refused(
    gadgets: Registry[Any], install: Callable[..., None], target: str, message: str
) -> None:
    install("gadget_shop", "screw", target)
    with pytest.raises(UsageError) as refusal:
        gadgets["screw"]
    assert str(refusal.value) == message


def test_entry_points_of_one_name(
    tmp_path: Path, folder: Path, gadgets: Registry[Any], install: Callable[..., None]
) -> None:
    """Two packages, a package and a --plugin, a package and a file of the folder."""
    install("gadget_shop", "screw", "gadget_shop")
    install("gadget_mall", "screw", "gadget_mall")
    install("gadget_hall", "nail", "gadget_hall")
    install("gadget_wall", "hook", "gadget_wall")
    with pytest.raises(UsageError, match=r"two gadgets are named 'screw': gadget_.* and gadget_"):
        gadgets["screw"]
    (tmp_path / "mine.py").write_text(source("nail"))
    with pytest.raises(UsageError, match=r"two gadgets are named 'nail': gadget_hall and .*mine"):
        load_plugin(tmp_path / "mine.py")
    (folder / "hook.py").write_text(source("hook"))
    importlib.invalidate_caches()
    with pytest.raises(UsageError, match=r"two gadgets are named 'hook': .* and gadget_wall"):
        gadgets["hook"]


def test_a_package_listed_twice_is_one(
    tmp_path: Path, gadgets: Registry[Any], install: Callable[..., None]
) -> None:
    """As a package installed twice, or in editable mode, can be."""
    install("gadget_shop", "screw", "gadget_shop")
    install("gadget_shop_again", "screw", "gadget_shop")
    assert gadgets["screw"].__module__ == "gadget_shop"


def test_our_own_plugins_are_files() -> None:
    for registry in REGISTRIES:
        files = {file.stem for file in (ROOT / registry.folder).glob("[a-z]*.py")}
        assert set(registry.names()) == files
        for name in files:
            assert registry[name].name == name


def test_everything_public_is_there() -> None:
    assert all(getattr(purebench, name) is not None for name in purebench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Atack'"):
        purebench.Atack  # noqa: B018


FRUGAL = {
    "import": "import purebench",
    "names": "import purebench.registry as r; assert all(x.names() for x in r.REGISTRIES)",
    "help": "bench('--help')",
    "no arguments": "bench()",
    "version": "bench('--version')",
    "bad option": "bench('--attack', 'blend', '--atack')",
    "bad command": "bench('lits')",
    "bad YAML": "bench('--config', 'nowhere.yaml')",
}


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """Neither torch nor a plug-in by what must be quick."""
    program = f"""
import runpy, sys

def bench(*words):
    sys.argv = ["bench.py", *words]
    try:
        runpy.run_path("bench.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == (2 if "bad" in case else 0), end.code

for case, line in {FRUGAL!r}.items():
    exec(line)
    folders = ("attacks", "defenses", "models", "datasets")
    heavy = [name for name in sys.modules if name.startswith(
        ("torch", "numpy", "scipy", "PIL", *(f"purebench.{{folder}}." for folder in folders)))]
    assert not heavy, (case, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_plugin_folders_are_reached_through_the_package_only() -> None:
    assert DEFENSES["none"].__module__ == "purebench.defenses.none"
