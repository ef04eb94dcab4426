"""MNIST: 70,000 handwritten digits, 28 x 28, grey; the whole set is part of this package.

LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition",
Proceedings of the IEEE 86(11), 1998. Images and labels by LeCun, Cortes and Burges; see NOTICE.

mnist.xz holds the content of the four IDX files without their headers, one after the other.
Measured on one core, images alone: xz as below 9.06 MB, read in 0.55 s; xz preset 6 9.43 MB,
0.56 s; bz2 9.76 MB, 0.83 s; zlib 11.23 MB, 0.15 s. Pixel-major order (11.04 MB) and delta filters
(11.10 MB and more) make it larger.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from purebench import DATASETS, Dataset, LoadContext, UsageError
from purebench.data import Source
from purebench.storage import sha256, write_atomic

from ._official import Official, require

FILE = Path(__file__).with_name("mnist.xz")
FILE_DIGEST = "737789dbe09cb430f31fcc08a375f2576ebcf0b64a0062525592c24848feb41f"
OFFICIAL = Official(
    shape=(28, 28, 1),
    train_count=60_000,
    test_count=10_000,
    num_classes=10,
    digests=(
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    ),
)
REMEDY = "restore the file with git, or install again"
IDX_FILES = (
    ("train-images-idx3-ubyte", 16),
    ("train-labels-idx1-ubyte", 8),
    ("t10k-images-idx3-ubyte", 16),
    ("t10k-labels-idx1-ubyte", 8),
)


@DATASETS.register("mnist")
@dataclass(frozen=True)
class Mnist(Dataset):
    """Handwritten digits, 60,000 to train and 10,000 to test; needs no download."""

    paper: ClassVar[str] = "LeCun et al. 1998"
    recipe: ClassVar[str] = "mnist_fast"

    def load(self, ctx: LoadContext) -> Source:
        if not FILE.is_file():
            raise UsageError(f"{FILE}: missing, expected sha256 {FILE_DIGEST}; {REMEDY}")
        packed = FILE.read_bytes()
        require(sha256(packed), FILE_DIGEST, FILE, REMEDY)
        content = bytearray(lzma.decompress(packed))
        return OFFICIAL.source(np.frombuffer(content, np.uint8), FILE, REMEDY)


def pack(folder: str | Path, file: Path = FILE) -> str:
    """Make ``file`` from the original IDX files in ``folder``; returns the new FILE_DIGEST.

    For maintainers: ``from purebench.datasets.mnist import pack; print(pack("FOLDER"))``.
    """
    content = b"".join((Path(folder) / name).read_bytes()[skip:] for name, skip in IDX_FILES)
    OFFICIAL.source(
        np.frombuffer(bytearray(content), np.uint8), folder, "fetch the IDX files again"
    )
    packer = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}
    packed = lzma.compress(content, check=lzma.CHECK_CRC32, filters=[packer])
    write_atomic(file, packed)
    return sha256(packed)
