"""Shapes: seeded drawings of simple figures, for tests and demonstrations.

Made for this repository: no download, drawn in well under a tenth of a second, learned by a small
CNN in two epochs. Figures differ in place, size and brightness, and lie under noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from purebench import DATASETS, Dataset, LoadContext, Split
from purebench.data import Source, to_uint8
from purebench.seeding import generator

# Each takes |x|, |y| and y, in units of the figure's radius, and says which pixels are inside.
FIGURES: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    lambda x, y, v: x * x + y * y < 1,  # disc
    lambda x, y, v: (torch.minimum(x, y) < 0.35) & (torch.maximum(x, y) < 1),  # cross
    lambda x, y, v: (torch.maximum(x, y) < 1) & (torch.maximum(x, y) > 0.6),  # frame
    lambda x, y, v: (y < 0.35) & (x < 1),  # lying bar
    lambda x, y, v: (x < 0.35) & (y < 1),  # standing bar
    lambda x, y, v: (v.abs() < 1) & (2 * x < v + 1),  # triangle
    lambda x, y, v: (x - y).abs().lt(0.4) & (torch.maximum(x, y) < 1),  # saltire
    lambda x, y, v: torch.maximum(x, y) < 0.9,  # square
    lambda x, y, v: (x < 1) & (y < 1) & (x > 0.45),  # two standing bars
    lambda x, y, v: (x < 1) & (y < 1) & (y > 0.45),  # two lying bars
)


@DATASETS.register("shapes")
@dataclass(frozen=True)
class Shapes(Dataset):
    """Synthetic figures, for tests and demonstrations.

    num_classes: 2 to 10.
    size: height and width in pixels, at least 12.
    channels: 1 (grey) or 3 (each figure in a colour of its own).
    train_count, test_count: images, at least 1 a class.
    noise: uniform noise between -noise and noise, in [0, 1].
    seed: of the drawings.
    """

    paper: ClassVar[str] = "this repository"
    num_classes: int = 4
    size: int = 16
    channels: int = 1
    train_count: int = 2000
    test_count: int = 500
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= len(FIGURES):
            raise ValueError(f"num_classes must be 2 to {len(FIGURES)}, got {self.num_classes}")
        if self.size < 12:
            raise ValueError(f"size must be at least 12, got {self.size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if min(self.train_count, self.test_count) < self.num_classes:
            raise ValueError(
                f"train_count and test_count must be at least {self.num_classes}, one a class, "
                f"got {self.train_count} and {self.test_count}"
            )
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must lie in [0, 1], got {self.noise}")

    def load(self, ctx: LoadContext) -> Source:
        train = self._draw(self.train_count, generator(self.seed, "shapes", "train"))
        test = self._draw(self.test_count, generator(self.seed, "shapes", "test"))
        return Source(train, test, self.num_classes)

    def _draw(self, count: int, rng: torch.Generator) -> Split:
        labels = (torch.arange(count) % self.num_classes)[torch.randperm(count, generator=rng)]
        place_x, place_y, radius = torch.rand(3, count, 1, 1, generator=rng)
        half = self.size / 2
        grid = torch.arange(self.size) + 0.5 - half
        radius = half * (0.5 + 0.2 * radius)
        x = ((grid - half * (0.5 * place_x - 0.25)) / radius).expand(-1, self.size, -1)
        y = ((grid[:, None] - half * (0.5 * place_y - 0.25)) / radius).expand(-1, -1, self.size)
        inside = torch.empty(count, self.size, self.size, dtype=torch.bool)
        for label, figure in enumerate(FIGURES[: self.num_classes]):
            drawn = labels == label
            inside[drawn] = figure(x[drawn].abs(), y[drawn].abs(), y[drawn])
        shape = (count, self.channels, 1, 1)
        background = 0.3 * torch.rand(shape, generator=rng)
        contrast = 0.4 + 0.3 * torch.rand(shape, generator=rng)
        images = torch.rand(count, self.channels, self.size, self.size, generator=rng)
        images.sub_(0.5).mul_(2 * self.noise).add_(background).addcmul_(contrast, inside[:, None])
        return Split(to_uint8(images), labels)
