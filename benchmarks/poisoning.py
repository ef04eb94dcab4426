"""Poisoning: each attack with a fixed trigger, ours against its definition image by image.

    python -m benchmarks.poisoning [--quick]

Ours poisons a tenth of a training split, as a run does: the split's copy, the draw and the labels
count. The usual way is that of ``benchmarks._reference``: PIL image -> numpy -> PIL image -> PNG
file, in memory where there is such a file system; it works through a sample, as its time is the
same for each image. Compared are the time for one planted image, and the pixels. Left out of both
are cover images, and the training of a trigger that is learned.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn

from purebench import ATTACKS, AttackContext, CleanLabelAttack, Goal, PoisoningAttack, Split
from purebench.data import Source
from purebench.settings import describe
from purebench.storage import need_writable
from purebench.training import RECIPES

from ._reference import (
    AddToImage,
    BlendImage,
    BlendPieces,
    DitherImage,
    Pixels,
    StampImage,
    WarpImage,
    hwc,
)
from ._timing import Spread, Times, conditions, interleave, ratios
from .pipeline import OURS, REFERENCE, Setting, default_scratch

adaptive_blend = import_module("purebench.attacks.adaptive_blend")
low_frequency = import_module("purebench.attacks.low_frequency")

NAMES = ("badnets", "blend", "sig", "bpp", "wanet", "low_frequency", "adaptive_blend")
_COPY = "the split's copy", OURS
TARGET = 30.0
CHUNK = 256  # images that an attack plants at once
SLACK = 1e-3  # share of values that may differ by one step: doubles round otherwise than floats

PerImage = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True, eq=False)
class Contest:
    """One attack, its context, what it planted, and the definition image by image."""

    attack: PoisoningAttack
    context: AttackContext

    @classmethod
    def of(cls, name: str, setting: Setting) -> Contest:
        plugin = ATTACKS[name]
        attack = _learnt(plugin)()
        if "cover_ratio" in describe(attack):
            attack = replace(attack, cover_ratio=0.0)  # type: ignore[call-arg]
        context = setting.context()
        if isinstance(attack, CleanLabelAttack):
            context.poison_rate = 1.0  # of the target class, a tenth of the images
        return cls(attack, context)

    def per_image(self, trigger: nn.Module) -> PerImage:
        """A fresh one: it may count images."""
        tensors = trigger.state_dict()
        if isinstance(self.attack, adaptive_blend.AdaptiveBlend):
            pattern = hwc(tensors["pattern"] * 255).round()
            return BlendPieces(pattern, self.attack.train_alpha, self.masks(self.attack))
        if "pattern" in tensors:
            return BlendImage(hwc(tensors["pattern"] * 255).round(), float(trigger.alpha))  # type: ignore[arg-type]
        if "mask" in tensors:
            return StampImage(hwc((tensors["mask"] * 255).to(torch.uint8)))
        if "grid" in tensors:
            return WarpImage(tensors["grid"][None])
        if "signal" in tensors:
            signal = tensors["signal"].numpy() * 255
            return AddToImage(signal[:, None] if self.context.train.shape[0] == 3 else signal)
        if "perturbation" in tensors:
            return AddToImage(hwc(tensors["perturbation"]) * 255)
        return DitherImage(self.attack.levels)  # type: ignore[attr-defined]

    def masks(self, attack: Any) -> Iterator[Pixels]:
        """Those that the attack draws, in its order."""
        _, height, width = self.context.train.shape
        cell = adaptive_blend.cells(math.isqrt(attack.pieces), (height, width))
        rng = self.context.generator("planted", "poisoned")
        count = attack.pieces - round(attack.masked * attack.pieces)
        while True:
            yield from adaptive_blend.kept(attack.pieces, count, CHUNK, rng)[:, cell].numpy()


@dataclass(frozen=True)
class Result:
    """planted: images that ours plants. share: of values that differ by one step.
    usual, ours, copy: microseconds a planted image, one entry a round; copy: of the whole split,
        which is a part of ours.
    """

    name: str
    planted: int
    share: float
    usual: Sequence[float]
    ours: Sequence[float]
    copy: Sequence[float]

    def row(self) -> tuple[str, ...]:
        faster = ratios(self.usual, self.ours)
        bare = [own - copy for own, copy in zip(self.ours, self.copy, strict=True)]
        return (
            self.name,
            f"{self.planted:,}",
            f"{self.share:.3%}",
            Spread.of(self.usual).text(),
            Spread.of(self.ours).text(),
            faster.text(),
            "yes" if faster.median >= TARGET else "no",
            f"{Spread.of(self.copy).median:.3g}",
            f"{ratios(self.usual, bare).median:.3g}",
        )


def _learnt(plugin: type) -> type[PoisoningAttack]:
    """The attack with a trigger that need not be learned first."""

    def make_trigger(self: PoisoningAttack, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        trigger: nn.Module = plugin.make_trigger(self, shape, rng)  # type: ignore[attr-defined]
        if "perturbation" in trigger.state_dict():
            coefficients = torch.randn(shape[0], 4, 4, generator=rng)
            wave = low_frequency.smooth(coefficients, (shape[1], shape[2]), 0.2)
            trigger.get_buffer("perturbation").copy_(wave)
        return trigger

    body = {"make_trigger": make_trigger, "learn_trigger": lambda *_: None}
    return type(plugin.__name__, (plugin,), body)


def setting(count: int, side: int, channels: int) -> Setting:
    """``count`` images of noise of ten classes, a tenth of them poisoned."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=rng)
    train = Split(images, torch.arange(count) % 10)
    source = Source(train, train[torch.arange(10)], 10)
    return Setting(source, "small_cnn", RECIPES["mnist_fast"], 0.1, Goal(10))


def plant(images: Sequence[Image.Image], trigger: PerImage, folder: Path) -> list[Image.Image]:
    """One after the other, each saved as a PNG file."""
    planted = []
    for number, image in enumerate(images):
        planted.append(trigger(image))
        planted[-1].save(folder / f"{number}.png")
    return planted


def differing(ours: Tensor, usual: Sequence[Image.Image]) -> float:
    """Share of values that differ by one step. AssertionError where some differ by more."""
    theirs = torch.from_numpy(np.stack([np.atleast_3d(np.array(image)) for image in usual]))
    apart = (ours.int() - theirs.permute(0, 3, 1, 2).int()).abs()
    assert apart.max() <= 1, f"pixels are {int(apart.max())} steps apart"
    return apart.float().mean().item()


def measure(
    given: Setting, names: Sequence[str], sample: int, repeats: int, scratch: Path
) -> list[Result]:
    """One result an attack, all from the same rounds."""
    runs: dict[tuple[str, str], Callable[[Times], object]] = {}
    counts: dict[str, tuple[int, int, float]] = {}

    def ours(contest: Contest, times: Times) -> None:
        with times.measured():
            contest.attack.poison(contest.context)

    def copying(times: Times) -> None:
        with times.measured():
            given.source.train.images.clone()

    def usual(contest: Contest, trigger: nn.Module, images: list[Image.Image], t: Times) -> None:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="purebench-") as place:
            per_image = contest.per_image(trigger)
            with t.measured():
                plant(images, per_image, Path(place))

    for name in names:
        contest = Contest.of(name, given)
        split, poisoned, trigger = contest.attack.poison(contest.context)
        first = poisoned[: sample if name != "bpp" else max(1, sample // 20)]
        images = [Image.fromarray(array) for array in hwc(given.source.train.images[first])]
        with tempfile.TemporaryDirectory(dir=scratch, prefix="purebench-") as place:
            planted = plant(images, contest.per_image(trigger), Path(place))
        share = differing(split.images[first], planted)
        assert share <= SLACK, f"{name}: {share:.2%} of the values differ"
        counts[name] = len(poisoned), len(first), share
        runs[name, REFERENCE] = partial(usual, contest, trigger, images)
        runs[name, OURS] = partial(ours, contest)
    runs[_COPY] = copying
    times = interleave(runs, repeats)
    return [
        Result(
            name,
            own,
            share,
            [1e6 * value / few for value in times[name, REFERENCE].wall_seconds],
            [1e6 * value / own for value in times[name, OURS].wall_seconds],
            [1e6 * value / own for value in times[_COPY].wall_seconds],
        )
        for name, (own, few, share) in counts.items()
    ]


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poisoning", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--images", type=int, default=50_000, help="(default: 50000)")
    parser.add_argument("--side", type=int, default=32, help="of an image (default: 32)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument(
        "--sample", type=int, default=1000, help="for the usual way (default: 1000)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--quick", action="store_true", help="2000 images, 100, one round")
    parser.add_argument("--scratch", type=Path, default=default_scratch(), help="for PNG files")
    options = parser.parse_args(words)
    if options.quick:
        options.images, options.sample, options.repeats = 2000, 100, 1
    need_writable(options.scratch)
    torch.set_num_threads(1)
    given = setting(options.images, options.side, options.channels)
    found = measure(given, NAMES, options.sample, options.repeats, options.scratch)
    heads = ("attack", "planted", "off by one", "reference, us", "ours, us", "times faster",
             f">= {TARGET:g}", "copy, us", "without it")  # fmt: skip
    rows = [result.row() for result in found]
    print(tabulate(rows, heads, colalign=("left", *["right"] * 8), disable_numparse=True))
    about = conditions()
    print(
        f"\n{options.images:,} images of {options.side}x{options.side}x{options.channels}; "
        "us: wall time a planted image; copy: of the whole split, a part of ours; "
        f"n = {options.repeats}, interleaved: median (least .. greatest); "
        f"PNG files in {options.scratch}."
    )
    print(f"{about['machine']}, {about['threads']} thread; torch {about['versions']['torch']}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
