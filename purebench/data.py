"""Data: a split as one uint8 tensor, the three parties' shares of a dataset, the benign draw."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .errors import UsageError
from .progress import Progress
from .seeding import generator


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images, whole, on one device.

    images: (N, C, H, W) uint8.
    labels: (N,) int64 in 0..K-1.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be (N, C, H, W) uint8, got {tuple(self.images.shape)} "
                f"{self.images.dtype}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be ({len(self.images)},) int64, got {tuple(self.labels.shape)} "
                f"{self.labels.dtype}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> Split:
        return Split(self.images[indices], self.labels[indices])

    @property
    def shape(self) -> torch.Size:
        """Of one image: (C, H, W)."""
        return self.images.shape[1:]

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def digest(self) -> str:
        """sha256 over pixels and labels, hexadecimal."""
        sha = hashlib.sha256()
        for tensor in (self.images, self.labels):
            sha.update(tensor.cpu().contiguous().numpy().data)
        return sha.hexdigest()


class Source(NamedTuple):
    """What a dataset plug-in loads: the official splits."""

    train: Split
    test: Split
    num_classes: int

    def digest(self) -> str:
        """Names the content: sha256, hexadecimal."""
        return hashlib.sha256((self.train.digest() + self.test.digest()).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class DataBundle:
    """A dataset as the three parties see it: the attacker `train`, the defender `benign`, the
    judge `test`.
    """

    name: str
    num_classes: int
    train: Split
    benign: Split
    test: Split


@dataclass(frozen=True)
class LoadContext:
    """Where data is kept and whether it may be fetched.

    root: folder of downloaded data; created when needed.
    offline: open no socket.
    """

    root: Path
    offline: bool = False
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Dataset(ABC):
    """A dataset plug-in: its fields are its settings, ``load`` reads it.

    recipe: name of the training recipe used unless the user names one.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    recipe: ClassVar[str] = "mnist_fast"

    @abstractmethod
    def load(self, ctx: LoadContext) -> Source:
        """The splits on the CPU. UsageError for what is missing or damaged: file, expected and
        actual digest, what to do."""


def batches(images: Tensor, most: int) -> tuple[Tensor, ...]:
    """Images (N, C, H, W) in parts of ``most``; of fewer, by their pixels, above 64x64."""
    size = most * 64 * 64 // (images.shape[2] * images.shape[3])
    parts: tuple[Tensor, ...] = images.split(max(1, min(most, size)))
    return parts


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]. A product, which every device rounds alike."""
    return images.to(torch.float32).mul_(1 / 255)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [0, 1] -> uint8, rounded half to even, clipped. Undoes ``to_float`` exactly."""
    # by way of int16, as no vector instruction takes a float to a byte: half the time on a CPU
    return images.mul(255).round_().clamp_(0, 255).to(torch.int16).to(torch.uint8)


def put(images: Tensor, indices: Tensor, values: Tensor) -> None:
    """``images[indices] = values`` in place, uint8 (N, C, H, W), contiguous; eight bytes at once
    where an image is so many, which takes a third of the time."""
    wide = torch.int64 if images.shape[1:].numel() % 8 == 0 else torch.uint8
    images.flatten(1).view(wide)[indices] = values.flatten(1).view(wide)


def stratified(labels: Tensor, count: int, num_classes: int, rng: torch.Generator) -> Tensor:
    """Indices (count,), sorted, of a random draw that keeps the classes' shares.

    Each class gets its share rounded down; the remainders go to the classes with the largest
    fractions, the lower class first.
    """
    sizes = torch.bincount(labels.cpu(), minlength=num_classes)
    exact = sizes.double() * count / len(labels)
    shares = exact.long()
    order = torch.argsort(shares.double() - exact, stable=True)
    shares[order[: count - int(shares.sum())]] += 1
    parts = []
    for label in range(num_classes):
        members = torch.nonzero(labels.cpu() == label).flatten()
        parts.append(members[torch.randperm(len(members), generator=rng)[: shares[label]]])
    return torch.cat(parts).sort().values


def make_bundle(
    name: str,
    source: Source,
    *,
    seed: int,
    benign_fraction: float,
    held_out: bool,
) -> DataBundle:
    """Draw the defender's share from the seed alone, so that every attack and defense meets it.

    Args:
        benign_fraction: share of the training split, 0 < fraction < 1.
        held_out: take the draw out of ``train``, instead of leaving it there as the field does.
    """
    if not 0 < benign_fraction < 1:
        raise UsageError(f"benign fraction must lie between 0 and 1, got {benign_fraction}")
    train, test, num_classes = source
    count = round(benign_fraction * len(train))
    if count < 2 * num_classes:
        raise UsageError(
            f"benign fraction {benign_fraction} of {len(train)} images leaves the defender "
            f"{count}; it needs at least 2 a class, {2 * num_classes}"
        )
    drawn = stratified(train.labels, count, num_classes, generator(seed, "benign"))
    benign = train[drawn]
    if held_out:
        kept = torch.ones(len(train), dtype=torch.bool)
        kept[drawn] = False
        train = train[torch.nonzero(kept).flatten()]
    return DataBundle(name, num_classes, train, benign, test)
