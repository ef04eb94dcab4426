"""Doctor: what this machine has, and whether a training repeats bit for bit on it."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import machine
from .data import LoadContext, Split
from .errors import UsageError
from .model import Task
from .progress import Progress
from .registry import DATASETS, MODELS
from .seeding import isolated
from .storage import need_writable
from .training import Recipe, fit

OPTIONAL = {"jinja2": "page", "matplotlib": "figures", "ray": "ray", "submitit": "slurm"}


def report(data_root: Path, output: Path, device_name: str) -> bool:
    """Print what was found; True where all is well."""
    well = True
    for name, found in machine.versions().items():
        well &= found != "missing"
        print(f"{name:<12} {found}")
    for package, extra in OPTIONAL.items():
        print(f"{package:<12} {_installed(package, extra)}")
    print(f"{'commit':<12} {machine.commit() or 'not a checkout'}")
    device = machine.pick_device(device_name)
    print(f"{'device':<12} {device}: {machine.device_name(device)}")
    print(f"{'threads':<12} {torch.get_num_threads()} by default; a run uses 1 (--threads)")
    for name, folder in (("output", output), ("data", data_root)):
        try:
            need_writable(folder)
            free = shutil.disk_usage(folder).free / 1e9
            print(f"{name:<12} {folder}{' ' * 2}writable, {free:.0f} GB free")
        except UsageError as error:
            well = False
            print(f"{name:<12} {error}")
    files = sorted(path for path in data_root.glob("*") if path.is_file())
    for path in files:
        print(f"{'':<12} {path}  {path.stat().st_size / 1e6:.0f} MB")
    try:
        DATASETS["mnist"]().load(LoadContext(data_root, offline=True))
        print(f"{'mnist':<12} whole; others are fetched when first used")
    except UsageError as error:
        well = False
        print(f"{'mnist':<12} {error}")
    same = repeatable(device)
    well &= same
    print(f"{'repeatable':<12} {'yes: two trainings, equal bits' if same else 'NO'}")
    print("all well" if well else "something is missing, see above")
    return well


def _installed(package: str, extra: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f'not installed (pip install -e ".[{extra}]")'


def repeatable(device: torch.device) -> bool:
    """Whether the same short training, twice, gives the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = (_short_training(device) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _short_training(device: torch.device) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (512, 3, 32, 32), generator=rng, dtype=torch.uint8)
    split = Split(images, torch.randint(10, (512,), generator=rng)).to(device)
    with isolated(0):
        model = MODELS["small_cnn"]().build(Task.of(split, 10)).to(device)
    recipe = Recipe(epochs=2, crop=4, flip=True)
    fit(model, split, recipe, seed=0, progress=Progress(quiet=True))
    return list(model.state_dict().values())
