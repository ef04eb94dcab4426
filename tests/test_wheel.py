"""The wheel holds all of Purebench under its one name, and lives beside a rival `datasets`."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("attacks", "datasets", "defenses", "leaderboards", "models")
RIVALS = {
    "datasets/__init__.py": "def load_dataset():\n    return 'the rival'\n",
    "datasets/mnist.py": "rows = 70_000\n",
    "models/__init__.py": "from .resnet18 import depth\n",
    "models/resnet18.py": "depth = 18\n",
}
USE_RIVALS = """
import datasets, datasets.mnist, models
assert datasets.load_dataset() == "the rival" and datasets.mnist.rows == 70_000
assert models.depth == 18
"""
USE_OURS = """
import pathlib, sys
from purebench import DATASETS, LoadContext, cli
from purebench.registry import REGISTRIES
import purebench.leaderboards.table
assert pathlib.Path(sys.argv[1]) in pathlib.Path(purebench.__file__).parents, purebench.__file__
assert cli.main(["list"]) == 0
for registry in REGISTRIES:
    for name in registry.names():
        assert registry[name].__module__ == f"purebench.{registry.folder}.{name}"
source = DATASETS["mnist"]().load(LoadContext(pathlib.Path("data"), offline=True))
assert (len(source.train), len(source.test)) == (60_000, 10_000)
"""


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] = os.environ) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("checkout")
    litter = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("purebench", *FOLDERS):
        shutil.copytree(ROOT / folder, copy / folder, ignore=litter)
    for name in ("pyproject.toml", "bench.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    run("-c", build, cwd=copy)
    (built,) = copy.glob("dist/*.whl")
    return built


def test_the_wheel_holds_every_module_and_the_digits(wheel: Path) -> None:
    expected = {
        file.relative_to(ROOT).as_posix() for file in (ROOT / "purebench").rglob("*.py")
    } | {
        f"purebench/{file.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for file in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).glob("*.xz"))
    }
    expected |= {
        f"purebench/leaderboards/{name}"
        for name in ("page.css", "page.html", "page.js", "reference.csv")
    }
    assert "purebench/datasets/mnist.xz" in expected
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_wheel_has_one_name_and_its_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names} - {"purebench"}
        assert info.startswith("purebench-")
        assert archive.read(f"{info}/top_level.txt").split() == [b"purebench"]
        assert b"purebench = purebench.cli:main" in archive.read(f"{info}/entry_points.txt")
    assert {f"{info}/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= set(names)


def test_the_wheel_lives_beside_rivals(wheel: Path, tmp_path: Path) -> None:
    """Both work in one process; when ours is removed, the rivals are as they were."""
    site = tmp_path / "site"
    for name, text in RIVALS.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", site, wheel, cwd=tmp_path)
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    listed = run("-c", USE_RIVALS + USE_OURS + USE_RIVALS, site, cwd=tmp_path, env=env)
    assert all(f"\n  {name} " in listed for name in ("blend", "fine_tune", "small_cnn", "mnist"))

    (record,) = site.glob("purebench-*.dist-info/RECORD")
    for line, *_ in csv.reader(record.read_text().splitlines()):
        (site / line).unlink(missing_ok=True)
    run("-c", USE_RIVALS, cwd=tmp_path, env=env)
    left = {file.relative_to(site).as_posix() for file in site.rglob("*") if file.is_file()}
    assert {file for file in left if not file.startswith(("purebench", "bin/"))} == set(RIVALS)
    assert all((site / name).read_text() == text for name, text in RIVALS.items())
