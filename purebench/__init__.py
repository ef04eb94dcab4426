"""Purebench: backdoor attacks, defenses and leaderboards for image classifiers.

This module is the vocabulary that plug-ins import. Names are looked up when first used, so that
``import purebench`` does not import torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .registry import ATTACKS, DATASETS, DEFENSES, MODELS

if TYPE_CHECKING:
    from .attack import (
        Attack,
        AttackContext,
        BackdooredModel,
        CleanLabelAttack,
        Goal,
        PoisoningAttack,
    )
    from .data import DataBundle, Dataset, LoadContext, Split
    from .defense import Defense, DefenseContext, Verdict
    from .errors import NotApplicable, UsageError
    from .model import Architecture, Normalise, Task
    from .picture import Picture
    from .purification import Purified, purify
    from .training import Recipe, fit

__version__ = "0.1.0"

__all__ = [
    "ATTACKS",
    "DATASETS",
    "DEFENSES",
    "MODELS",
    "Architecture",
    "Attack",
    "AttackContext",
    "BackdooredModel",
    "CleanLabelAttack",
    "DataBundle",
    "Dataset",
    "Defense",
    "DefenseContext",
    "Goal",
    "LoadContext",
    "Normalise",
    "NotApplicable",
    "Picture",
    "PoisoningAttack",
    "Purified",
    "Recipe",
    "Split",
    "Task",
    "UsageError",
    "Verdict",
    "__version__",
    "fit",
    "purify",
]

_HOMES = {
    "attack": (
        "Attack",
        "AttackContext",
        "BackdooredModel",
        "CleanLabelAttack",
        "Goal",
        "PoisoningAttack",
    ),
    "data": ("DataBundle", "Dataset", "LoadContext", "Split"),
    "defense": ("Defense", "DefenseContext", "Verdict"),
    "errors": ("NotApplicable", "UsageError"),
    "model": ("Architecture", "Normalise", "Task"),
    "picture": ("Picture",),
    "purification": ("Purified", "purify"),
    "training": ("Recipe", "fit"),
}

# A split is copied into huge pages in a quarter of the time. torch reads this once, on its import.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# In a checkout the plug-in folders lie beside this package; in a wheel they lie inside it. Either
# way they are purebench.attacks, purebench.datasets, ... and never a top-level name.
_beside = Path(__file__).resolve().parent.parent
if (_beside / "bench.py").is_file() and (_beside / "attacks").is_dir():
    __path__.append(str(_beside))


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
