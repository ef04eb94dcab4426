"""Npz: your own data, as four arrays in one file of numpy's.

The file holds x_train, y_train, x_test and y_test, as numpy.savez or numpy.savez_compressed writes
them. Images are uint8: (N, H, W), (N, H, W, C) or (N, C, H, W); labels are whole numbers, (N,).
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from purebench import DATASETS, Dataset, LoadContext, Split, UsageError
from purebench.data import Source

from ._checks import check_labels, given

NAMES = ("x_train", "y_train", "x_test", "y_test")
CHANNELS = (1, 3)


@DATASETS.register("npz")
@dataclass(frozen=True)
class Npz(Dataset):
    """Your own data in one .npz file: x_train, y_train, x_test, y_test.

    path: the file.
    num_classes: None means the largest label + 1.
    layout: of images with four dimensions; auto finds the side of 1 or 3.
    """

    paper: ClassVar[str] = "your own data"
    path: str | None = field(default=None, metadata={"location": True})
    num_classes: int | None = None
    layout: Literal["auto", "NHWC", "NCHW"] = "auto"

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")

    def load(self, ctx: LoadContext) -> Source:
        file = given(self.path, "npz", "FILE.npz")
        arrays = read_arrays(file)
        for name in ("y_train", "y_test"):
            labels, images = arrays[name], arrays[name.replace("y", "x")]
            if labels.dtype.kind not in "iu" or labels.ndim != 1:
                raise UsageError(
                    f"{file}: {name} is {labels.shape} {labels.dtype}, expected whole numbers (N,)"
                )
            if len(labels) != len(images) or not len(labels):
                raise UsageError(f"{file}: {len(labels)} labels in {name}, {len(images)} images")
        largest = max(int(arrays["y_train"].max()), int(arrays["y_test"].max()))
        num_classes = max(largest + 1, 2) if self.num_classes is None else self.num_classes
        splits = []
        for part in ("train", "test"):
            check_labels(arrays[f"y_{part}"], num_classes, f"{file}: y_{part}")
            images = to_nchw(arrays[f"x_{part}"], self.layout, f"{file}: x_{part}")
            labels = arrays[f"y_{part}"].astype(np.int64)
            splits.append(Split(torch.from_numpy(images), torch.from_numpy(labels)))
        train, test = splits
        if train.shape != test.shape:
            raise UsageError(
                f"{file}: train images are (C, H, W) = {tuple(train.shape)}, "
                f"test images {tuple(test.shape)}; they must be alike"
            )
        return Source(train, test, num_classes)


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """The four arrays. Never unpickles. UsageError where one is missing or cannot be read."""
    try:
        with np.load(file, allow_pickle=False) as held:
            missing = [name for name in NAMES if name not in held]
            if not missing:
                return {name: held[name] for name in NAMES}
            found = ", ".join(held) or "nothing"
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None)  # the system's; numpy's own advise to unpickle
        raise UsageError(
            f"{file}: not a readable .npz of plain arrays, as numpy.savez writes it"
            f"{f': {reason}' if reason else ''}"
        ) from error
    raise UsageError(f"{file}: has no {', '.join(missing)}; it holds {found}")


def to_nchw(images: NDArray[Any], layout: str, where: str) -> NDArray[np.uint8]:
    """Images as (N, C, H, W), a copy. UsageError where type or shape is not as stated above."""
    if images.dtype != np.uint8:
        raise UsageError(
            f"{where} is {images.dtype}, expected uint8 in 0..255; "
            "of numbers in 0..1 make (x * 255).round().astype('uint8')"
        )
    if images.ndim == 3:
        images = images[:, None]
        layout = "NCHW"
    if images.ndim != 4 or 0 in images.shape:
        raise UsageError(f"{where} is {images.shape}, expected (N, H, W), NHWC or NCHW")
    if layout == "auto":
        last, first = images.shape[3] in CHANNELS, images.shape[1] in CHANNELS
        if last == first:
            raise UsageError(
                f"{where} is {images.shape}: which side is the channels? "
                "Say --set npz.layout=NHWC or npz.layout=NCHW"
            )
        layout = "NHWC" if last else "NCHW"
    if layout == "NHWC":
        images = images.transpose(0, 3, 1, 2)
    return np.array(images, np.uint8, order="C")
