"""Image folder: your own data, as image files in one folder a class.

``path`` holds train/CLASS/FILE and test/CLASS/FILE; or, with neither train nor test in it, just
CLASS/FILE: then a fifth of each class, chosen by a hash of the files' names, becomes the test
split. Classes are numbered in the order of their names. Files beginning with a dot are passed
over; every other one must be an image.
What becomes of rotation tags, palettes, alpha and 16 bits is said in _image_files.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from purebench import DATASETS, Dataset, LoadContext, Split, UsageError
from purebench.data import Source

from ._checks import given, listing
from ._image_files import read_image, stack

Files: TypeAlias = dict[str, list[Path]]


@DATASETS.register("image_folder")
@dataclass(frozen=True)
class ImageFolder(Dataset):
    """Your own images: PATH/train/CLASS/FILE and PATH/test/CLASS/FILE.

    path: the folder.
    size: every image is resized to size x size pixels; None asks that they are of one size.
    channels: 1 (grey) or 3 (RGB); None means 3 where any image has colour channels.
    """

    paper: ClassVar[str] = "your own data"
    path: str | None = field(default=None, metadata={"location": True})
    size: int | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")

    def load(self, ctx: LoadContext) -> Source:
        folder = given(self.path, "image_folder", "FOLDER")
        train, test = find_files(folder)
        files = [file for split in (train, test) for held in split.values() for file in held]
        images: list[NDArray[np.uint8]] = []
        faults: list[str] = []
        with ctx.progress.without_lines().bar("image_folder", len(files), "image") as bar:
            for file in files:
                try:
                    images.append(read_image(file, self.size, self.channels))
                except Exception as error:  # decoders raise anything on a damaged file
                    reason = " ".join(str(error).split()) or type(error).__name__
                    reason = reason.replace(str(file), file.name)
                    faults.append(f"{file.relative_to(folder)} ({reason})")
                bar.step()
        if faults:
            raise UsageError(f"{folder}: {len(faults)} files cannot be used: {listing(faults)}")
        pixels = stack(images, [str(file.relative_to(folder)) for file in files], folder)
        classes = list(train)
        labels = torch.tensor(
            [classes.index(name) for split in (train, test) for name in split for _ in split[name]]
        )
        count = sum(map(len, train.values()))
        return Source(
            Split(pixels[:count].clone(), labels[:count]),
            Split(pixels[count:].clone(), labels[count:]),
            len(classes),
        )


def find_files(folder: Path) -> tuple[Files, Files]:
    """Class -> its files, of train and test; every test class is a train class.

    Raises UsageError where the folder is not laid out as stated above.
    """
    if not folder.is_dir():
        raise UsageError(f"image_folder.path {folder}: not a folder")
    halves = [folder / "train", folder / "test"]
    present = [half.is_dir() for half in halves]
    if any(present) and not all(present):
        raise UsageError(
            f"{folder}: has {halves[present[1]].name}/ but no {halves[present[0]].name}/"
        )
    if all(present):
        train, test = map(_classes, halves)
        strangers = sorted(set(test) - set(train))
        if strangers:
            raise UsageError(f"{folder}: classes in test/ that train/ lacks: {listing(strangers)}")
        empty = [f"train/{name}" for name in train if not train[name]]
    else:
        everything = _classes(folder)
        empty = [name for name, files in everything.items() if len(files) < 2]
        train, test = {}, {}
        for name, files in everything.items():
            ranked = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
            count = max(1, round(len(files) / 5))
            test[name], train[name] = sorted(ranked[:count]), sorted(ranked[count:])
    if empty:
        raise UsageError(f"{folder}: classes with too few images: {listing(empty)}")
    if len(train) < 2 or not any(test.values()):
        raise UsageError(
            f"{folder}: each class has a folder of its own, at least 2 of them with images; "
            f"folders found: {listing(list(train)) or 'none'}"
        )
    return train, test


def _classes(folder: Path) -> Files:
    return {
        place.name: sorted(file for file in place.iterdir() if not file.name.startswith("."))
        for place in sorted(folder.iterdir())
        if place.is_dir() and not place.name.startswith(".")
    }
