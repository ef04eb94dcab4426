"""Reference: the backdoor pipeline as the field usually writes it, to measure ours against.

The steps are those of BackdoorBench (Wu et al., NeurIPS 2022, arXiv:2206.12654) and its relatives,
written anew: a dataset that hands out PIL images one by one, torchvision transforms, a DataLoader
with default collation, poisoned images kept as one PNG file each. Where habits differ, the faster
one is taken: samples are (image, label) without further bookkeeping, no resizing to the size that
the images have already, nothing of the trigger computed twice, folders made once, a patch by one
``np.maximum``, no loss computed in evaluation. Blended pixels are rounded, not truncated, so that
both pipelines train on the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from purebench import Goal, Recipe, Split, Task

Pixels = NDArray[Any]  # one image: (H, W) grey or (H, W, 3), uint8 unless said otherwise
Order = list[list[int]]  # an epoch: the indices in each batch
Loader = DataLoader[tuple[Any, int]]


def hwc(images: Tensor) -> NDArray[Any]:
    """(..., C, H, W) -> (..., H, W, C), or (..., H, W) where C is 1: what PIL takes."""
    array = images.movedim(-3, -1).numpy()
    return np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)


class BlendImage:
    """One PIL image -> PIL image: (1 - alpha) x + alpha * pattern.

    pattern: in 0..255, of the image's shape.
    """

    def __init__(self, pattern: Pixels, alpha: float) -> None:
        self.weighted_pattern = alpha * pattern.astype(np.float64)
        self.rest = 1 - alpha

    def __call__(self, image: Image.Image) -> Image.Image:
        mixed = self.rest * np.array(image) + self.weighted_pattern
        return _picture(mixed)


class StampImage:
    """One PIL image -> PIL image, with 255 where the mask has it.

    mask: 0 or 255, uint8, of the image's shape.
    """

    def __init__(self, mask: Pixels) -> None:
        self.mask = mask

    def __call__(self, image: Image.Image) -> Image.Image:
        return Image.fromarray(np.maximum(np.array(image), self.mask))


class AddToImage:
    """One PIL image -> PIL image, with ``offset`` added and clipped.

    offset: in units of 1/255, of the image's shape or one that broadcasts to it.
    """

    def __init__(self, offset: Pixels) -> None:
        self.offset = offset.astype(np.float64)

    def __call__(self, image: Image.Image) -> Image.Image:
        return _picture(np.array(image) + self.offset)


class WarpImage:
    """One PIL image -> PIL image, read at the points ``grid`` (1, H, W, 2) by torch."""

    def __init__(self, grid: Tensor) -> None:
        self.grid = grid

    def __call__(self, image: Image.Image) -> Image.Image:
        pixels = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)[None] / 255
        warped = F.grid_sample(pixels, self.grid, align_corners=True)
        return _picture(hwc(warped[0] * 255))


class DitherImage:
    """One PIL image -> PIL image with ``levels`` values a channel, by Floyd and Steinberg."""

    def __init__(self, levels: int) -> None:
        self.top = np.float32(levels - 1)

    def __call__(self, image: Image.Image) -> Image.Image:
        values = _unit(np.atleast_3d(np.array(image))) * self.top
        height, width, channels = values.shape
        errors = np.zeros((height + 1, width + 2, channels), np.float32)
        upper_left, upper, upper_right, left = np.array([1, 5, 3, 7], np.float32) / 16
        for y in range(height):
            for x in range(width):
                value = values[y, x] + errors[y, x] * upper_left + errors[y, x + 1] * upper
                value = value + errors[y, x + 2] * upper_right + errors[y + 1, x] * left
                values[y, x] = np.rint(value)
                errors[y + 1, x + 1] = value - values[y, x]
        return _picture((values / self.top * 255).squeeze())


class BlendPieces:
    """One PIL image after the other, each blended where its own mask has it, in [0, 1].

    pattern: as for ``BlendImage``. masks: (H, W) of bool, one an image, in turn.
    """

    def __init__(self, pattern: Pixels, alpha: float, masks: Iterable[Pixels]) -> None:
        self.pattern, self.alpha, self.masks = _unit(pattern), np.float32(alpha), iter(masks)

    def __call__(self, image: Image.Image) -> Image.Image:
        pixels = _unit(np.array(image))
        share = self.alpha * next(self.masks).reshape(*pixels.shape[:2], *[1] * (pixels.ndim - 2))
        return _picture((pixels * (1 - share) + self.pattern * share) * 255)


def _unit(pixels: Pixels) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = pixels.astype(np.float32) * np.float32(1 / 255)
    return unit


def _picture(values: Pixels) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


class ImageDataset(Dataset[tuple[Any, int]]):
    """Labelled images, one PIL image at a time; those that were poisoned are read from their file.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8, in memory, as torchvision's MNIST and CIFAR10 are.
        transform: PIL image -> tensor.
    """

    def __init__(
        self,
        images: NDArray[Any],
        labels: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.images = images
        self.labels = list(labels)
        self.transform = transform
        self.indices = list(range(len(images)))
        self.files: dict[int, Path] = {}

    def poison(
        self,
        chosen: Sequence[int],
        trigger: Callable[[Image.Image], Image.Image],
        goal: Goal,
        folder: Path,
    ) -> None:
        """Put the trigger on the chosen images, one by one, and save each as a PNG file."""
        for label in set(self.labels):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
        for index in chosen:
            label = self.labels[index]
            # array -> PIL -> array -> PIL: triggers are written as transforms of PIL images
            planted = trigger(Image.fromarray(self.images[index]))
            self.files[index] = folder / str(label) / f"{index}.png"
            planted.save(self.files[index])
            self.labels[index] = (label + 1) % goal.num_classes if goal.all_to_all else goal.target

    def keep(self, chosen: Sequence[int]) -> None:
        """Restrict to these images: for the success rate, those not of the target class."""
        self.indices = list(chosen)

    def picture(self, position: int) -> Image.Image:
        """The image before the transform."""
        index = self.indices[position]
        if index not in self.files:
            return Image.fromarray(self.images[index])
        image: Image.Image = Image.open(self.files[index])
        image.load()  # reads the file and closes it
        return image

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.transform(self.picture(position)), self.labels[self.indices[position]]


class ReferencePipeline:
    """Poison, load, train and evaluate, on the same splits as ours.

    Args:
        train: clean, on the CPU; so is ``test``.
        folder: where the PNG files go.
    """

    def __init__(
        self, train: Split, test: Split, task: Task, goal: Goal, recipe: Recipe, folder: Path
    ) -> None:
        self.goal, self.recipe, self.folder = goal, recipe, folder
        as_tensor = [transforms.ToTensor(), transforms.Normalize(task.mean, task.std)]
        augmented: list[Callable[..., Any]] = []
        if recipe.crop:
            augmented.append(transforms.RandomCrop(task.shape[1:], padding=recipe.crop))
        if recipe.flip:
            augmented.append(transforms.RandomHorizontalFlip())
        plain = transforms.Compose(as_tensor)
        test_images, test_labels = hwc(test.images), test.labels.tolist()
        self.train = ImageDataset(
            hwc(train.images), train.labels.tolist(), transforms.Compose(augmented + as_tensor)
        )
        self.clean = ImageDataset(test_images, test_labels, plain)
        self.triggered = ImageDataset(test_images, test_labels, plain)

    def poison(self, chosen: Sequence[int], trigger: Callable[[Image.Image], Image.Image]) -> None:
        """Plant the chosen training images, and trigger the test images that are not of the
        target class."""
        self.train.poison(chosen, trigger, self.goal, self.folder / "train")
        eligible = [
            index
            for index, label in enumerate(self.triggered.labels)
            if self.goal.all_to_all or label != self.goal.target
        ]
        self.triggered.poison(eligible, trigger, self.goal, self.folder / "test")
        self.triggered.keep(eligible)

    def train_loader(self, order: Order) -> Loader:
        """The training images in given batches. (Usually the loader shuffles for itself; given
        batches spare it that, and let both pipelines take the same steps.)"""
        return DataLoader(self.train, batch_sampler=order, num_workers=0)

    def test_loader(self, dataset: ImageDataset) -> Loader:
        """In order, in batches as large as in training, as usual."""
        return DataLoader(dataset, batch_size=self.recipe.batch_size, num_workers=0)

    def load(self, order: Order) -> int:
        """An epoch's training batches and both test sets, without a network; their images."""
        loaders = (
            self.train_loader(order),
            self.test_loader(self.clean),
            self.test_loader(self.triggered),
        )
        return sum(len(labels) for loader in loaders for _, labels in loader)

    def fit(self, model: nn.Module, orders: Sequence[Order]) -> list[float]:
        """Train for ``len(orders)`` epochs; the mean loss of each.

        model: takes normalised images: here normalisation is a transform.
        """
        recipe = self.recipe
        optimiser = torch.optim.SGD(  # in its default form, which is not fused
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        model.train()
        means = []
        step, steps = 0, sum(map(len, orders))
        for order in orders:
            losses = []
            for images, labels in self.train_loader(order):
                for group in optimiser.param_groups:
                    group["lr"] = recipe.lr_at(step, steps)
                optimiser.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimiser.step()
                losses.append(loss.item())  # for the running mean, at every step
                step += 1
            means.append(sum(losses) / len(losses))
        return means

    def score(self, model: nn.Module) -> tuple[int, int]:
        """(clean test images classified correctly, triggered ones given the attacker's label)."""
        model.eval()
        return self._correct(model, self.clean), self._correct(model, self.triggered)

    def _correct(self, model: nn.Module, dataset: ImageDataset) -> int:
        correct = 0
        with torch.no_grad():
            for images, labels in self.test_loader(dataset):
                predicted = model(images).argmax(1)
                correct += int((predicted == labels).sum().item())
        return correct
