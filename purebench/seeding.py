"""Seeding: every random number derives from (seed, purpose, names).

So adding a defense or an attack changes no other number, and no plug-in disturbs another's.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: object) -> int:
    """A seed in [0, 2**63) for one purpose, independent of every other purpose's."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator of its own, seeded by ``derive(seed, *names)``."""
    import torch

    return torch.Generator(device).manual_seed(derive(seed, *names))


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the global generators (random, numpy, torch) inside; leave them as they were, and
    torch's threads and default type, too."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    threads, kind = torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_default_dtype(kind)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
