"""Official: a published dataset as one run of bytes, each of its arrays checked by sha256.

Four arrays of uint8 follow one another: train images (N, H, W, C), train labels (N,), test images,
test labels. So a file of them needs no parser, and damage of any kind shows in a digest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purebench import Split, UsageError
from purebench.data import Source
from purebench.storage import sha256

Bytes: TypeAlias = NDArray[np.uint8]

ARRAYS = ("train images", "train labels", "test images", "test labels")


@dataclass(frozen=True)
class Official:
    """What the arrays of a published dataset must be.

    shape: of one image, (H, W, C).
    train_count, test_count: images in each split.
    digests: sha256 of the four arrays, in the order of ARRAYS.
    """

    shape: tuple[int, int, int]
    train_count: int
    test_count: int
    num_classes: int
    digests: tuple[str, str, str, str]

    def source(self, content: Bytes, origin: Path | str, remedy: str) -> Source:
        """The splits in ``content``, which is one-dimensional and writable.

        Raises UsageError where a digest differs: ``origin``, both digests, ``remedy``.
        """
        counts = (self.train_count, self.train_count, self.test_count, self.test_count)
        items = (self.shape, (), self.shape, ())
        sizes = [count * prod(item) for count, item in zip(counts, items, strict=True)]
        if len(content) > sum(sizes):
            raise UsageError(f"{origin}: {len(content)} bytes, expected {sum(sizes)}; {remedy}")
        parts = np.split(content, list(accumulate(sizes))[:-1])
        for what, part, expected in zip(ARRAYS, parts, self.digests, strict=True):
            require(sha256(part.data), expected, f"{origin}, {what}", remedy)
        tensors = [torch.from_numpy(part) for part in parts]
        train, test = (self._split(images, labels) for images, labels in (tensors[:2], tensors[2:]))
        return Source(train, test, self.num_classes)

    def _split(self, images: Tensor, labels: Tensor) -> Split:
        upright = images.view(-1, *self.shape).permute(0, 3, 1, 2)
        return Split(upright.clone(memory_format=torch.contiguous_format), labels.long())


def require(
    actual: str, expected: str, origin: Path | str, remedy: str, kind: str = "sha256"
) -> None:
    """UsageError where two digests differ."""
    if actual != expected:
        raise UsageError(f"{origin}: damaged: {kind} is {actual}, expected {expected}; {remedy}")


def digest(file: Path, kind: str = "sha256") -> str:
    """Of a file's content, hexadecimal."""
    sha = hashlib.new(kind, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
