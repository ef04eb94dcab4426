"""Pipeline: our pipeline and the field's usual one, side by side in one process at one thread.

    python -m benchmarks.pipeline

Both poison the same images with the same triggers, take the same batches in the same order, and
train the same network from the same weights. ``benchmarks._reference`` is the usual way: PIL image
by image, torchvision transforms, poisoned images as PNG files, a DataLoader without workers (one
process against one process; workers would give the reference cores that ours leaves idle).

Steps:
    poisoning: plant the poisoned share of the training split and trigger the test images.
    loading: make every batch of an epoch, of the clean and of the triggered test set, as the
        network takes them; no network runs.
    training: one epoch, loading included.
    evaluation: ACC and ASR of a trained network, loading included.
    end to end: poisoning, a training of several epochs, evaluation.

PNG files go to a file system in memory where there is one: what a disk adds to the reference is
not counted against it, unless ``--scratch`` names a folder on one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn

from purebench import (
    ATTACKS,
    DATASETS,
    MODELS,
    AttackContext,
    BackdooredModel,
    Goal,
    LoadContext,
    Normalise,
    PoisoningAttack,
    Recipe,
    Split,
    Task,
    UsageError,
)
from purebench.data import Source
from purebench.evaluate import Judge, predictions
from purebench.progress import Progress
from purebench.scores import Scores
from purebench.seeding import derive, isolated
from purebench.settings import describe
from purebench.storage import need_writable, write_atomic
from purebench.training import RECIPES, batches, fit

from ._reference import BlendImage, Order, ReferencePipeline, StampImage, hwc
from ._timing import Spread, Times, conditions, interleave, ratios

SEED = 0
QUIET = Progress(quiet=True)
TARGETS = {
    "poisoning, blend": 30.0,
    "poisoning, badnets": 30.0,
    "loading": 25.0,
    "training": 1.5,
    "evaluation": 2.0,
}
OURS, REFERENCE = "ours", "reference"


@dataclass(frozen=True, eq=False)
class Setting:
    """What both pipelines are given."""

    source: Source
    model: str
    recipe: Recipe
    poison_rate: float
    goal: Goal

    @cached_property
    def task(self) -> Task:
        return Task.of(self.source.train, self.source.num_classes)

    def build(self) -> nn.Module:
        """The network, always from the same weights."""
        with isolated(derive(SEED, "weights")):
            return MODELS[self.model]().build(self.task)

    def context(self, epochs: int = 1) -> AttackContext:
        return AttackContext(
            train=self.source.train,
            task=self.task,
            goal=self.goal,
            build=self.build,
            poison_rate=self.poison_rate,
            recipe=replace(self.recipe, epochs=epochs),
            device=torch.device("cpu"),
            seed=SEED,
            progress=QUIET,
        )

    def poison(self, attack: str) -> tuple[Split, Tensor, nn.Module]:
        return poisoning_attack(attack).poison(self.context())

    def reference(self, folder: Path) -> ReferencePipeline:
        return ReferencePipeline(
            self.source.train, self.source.test, self.task, self.goal, self.recipe, folder
        )

    def judge(self, trigger: nn.Module) -> Judge:
        return Judge(self.source.test, trigger, self.goal)

    def run(self, attack: str, epochs: int) -> tuple[BackdooredModel, Scores]:
        """Ours, end to end."""
        victim = poisoning_attack(attack).run(self.context(epochs))
        return victim, self.judge(victim.trigger).score(victim.model)

    @property
    def training_seed(self) -> int:
        """Of the training within an attack."""
        return derive(SEED, "training")

    def orders(self, epochs: int) -> list[Order]:
        """The indices in each batch of each epoch, read off our own batches."""
        count = len(self.source.train)
        numbered = Split(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count))
        plain = replace(self.recipe, crop=0, flip=False)
        return [
            [indices.tolist() for _, indices in batches(numbered, plain, self.training_seed, epoch)]
            for epoch in range(epochs)
        ]


def poisoning_attack(name: str) -> PoisoningAttack:
    """The attack plug-in with its default settings."""
    attack = ATTACKS[name]()
    assert isinstance(attack, PoisoningAttack), name
    return attack


def per_image(trigger: nn.Module) -> Callable[[Image.Image], Image.Image]:
    """The reference's counterpart of one of our triggers."""
    tensors = trigger.state_dict()
    if "pattern" in tensors:
        alpha = trigger.alpha
        assert isinstance(alpha, float)
        return BlendImage(hwc(tensors["pattern"] * 255).round(), alpha)
    return StampImage(hwc((tensors["mask"] * 255).to(torch.uint8)))


def without_normalisation(model: nn.Module) -> nn.Module:
    """The same network for images that a transform has normalised."""
    for name, layer in model.named_children():
        if isinstance(layer, Normalise):
            setattr(model, name, nn.Identity())
            return model
    raise ValueError("the network has no Normalise among its children")


class Instant(nn.Module):
    """In place of a network, where only the making of batches is measured."""

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 1)


def load_ours(setting: Setting, split: Split, judge: Judge) -> int:
    """What ``fit`` and ``Judge.score`` do to make their batches; the number of images."""
    count = sum(
        len(labels) for _, labels in batches(split, setting.recipe, setting.training_seed, epoch=0)
    )
    for tested in (judge.test, judge.triggered):
        classes, _ = predictions(Instant(), tested.images)
        count += len(classes)
    return count


def contestants(
    setting: Setting, epochs: int, folder: Path, scores: dict[str, list[float]]
) -> dict[tuple[str, str], Callable[[Times], object]]:
    """(step, pipeline) -> a measured run.

    Args:
        epochs: of the end-to-end run.
        folder: for PNG files.
        scores: receives ACC and ASR of both pipelines, end to end.
    """
    split, indices, trigger = setting.poison("blend")
    chosen = indices.tolist()
    judge = setting.judge(trigger)
    orders = setting.orders(epochs)
    (order,) = setting.orders(1)
    trained = setting.build()
    once = replace(setting.recipe, epochs=1)
    fit(trained, split, once, seed=setting.training_seed, progress=QUIET)
    reference = setting.reference(folder / "kept")
    reference.poison(chosen, per_image(trigger))

    def new_folder() -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(dir=folder)

    def poison_ours(attack: str, times: Times) -> None:
        with times.measured():
            planted, _, own_trigger = setting.poison(attack)
            setting.judge(own_trigger)
        assert len(planted) == len(split)

    def poison_reference(attack: str, times: Times) -> None:
        own_trigger = per_image(setting.poison(attack)[2])
        with new_folder() as place:
            pipeline = setting.reference(Path(place))
            with times.measured():
                pipeline.poison(chosen, own_trigger)

    def loading_ours(times: Times) -> None:
        with times.measured():
            load_ours(setting, split, judge)

    def loading_reference(times: Times) -> None:
        with times.measured():
            reference.load(order)

    def training_ours(times: Times) -> None:
        model = setting.build()
        with times.measured():
            fit(model, split, once, seed=setting.training_seed, progress=QUIET)

    def training_reference(times: Times) -> None:
        model = without_normalisation(setting.build())
        with times.measured():
            reference.fit(model, [order])

    def evaluation_ours(times: Times) -> None:
        with times.measured():
            judge.score(trained)

    def evaluation_reference(times: Times) -> None:
        model = setting.build()
        model.load_state_dict(trained.state_dict())
        without_normalisation(model)
        with times.measured():
            reference.score(model)

    def whole_ours(times: Times) -> None:
        with times.measured():
            _, found = setting.run("blend", epochs)
        scores[OURS] = [found.acc, found.asr]

    def whole_reference(times: Times) -> None:
        with new_folder() as place:
            pipeline = setting.reference(Path(place))
            model = without_normalisation(setting.build())
            with times.measured():
                pipeline.poison(chosen, per_image(trigger))
                pipeline.fit(model, orders)
                correct, fooled = pipeline.score(model)
        scores[REFERENCE] = [correct / len(pipeline.clean), fooled / len(pipeline.triggered)]

    found: dict[tuple[str, str], Callable[[Times], object]] = {}
    for attack in ("blend", "badnets"):
        found[f"poisoning, {attack}", REFERENCE] = partial(poison_reference, attack)
        found[f"poisoning, {attack}", OURS] = partial(poison_ours, attack)
    for step, usual, own in (
        ("loading", loading_reference, loading_ours),
        ("training", training_reference, training_ours),
        ("evaluation", evaluation_reference, evaluation_ours),
        ("end to end", whole_reference, whole_ours),
    ):
        found[step, REFERENCE], found[step, OURS] = usual, own
    return found


def default_scratch() -> Path:
    """A folder in memory where the system has one, else that of temporary files."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def sizes(setting: Setting, epochs: int) -> dict[str, int]:
    """How many images each step handles."""
    train, test = setting.source.train, setting.source.test
    triggered = int(setting.goal.eligible(test.labels).sum())
    planted = poisoning_attack("blend").poison_count(
        train.labels, setting.goal, setting.poison_rate
    )
    tested = len(test) + triggered
    return {
        "poisoning, blend": planted + triggered,
        "poisoning, badnets": planted + triggered,
        "loading": len(train) + tested,
        "training": len(train),
        "evaluation": tested,
        "end to end": planted + triggered + epochs * len(train) + tested,
    }


def table(times: Mapping[tuple[str, str], Times], counts: Mapping[str, int]) -> str:
    """One row a step: median (least .. greatest) over the rounds."""
    rows = []
    for step, count in counts.items():
        usual, own = times[step, REFERENCE], times[step, OURS]
        target = TARGETS.get(step)
        rows.append(
            (
                step,
                f"{count:,}",
                Spread.of(usual.wall_seconds).text(),
                Spread.of(own.wall_seconds).text(),
                ratios(usual.wall_seconds, own.wall_seconds).text(),
                ratios(usual.cpu_seconds, own.cpu_seconds).text(),
                f">= {target:g}" if target else "",
            )
        )
    headings = (
        "step",
        "images",
        "reference, s",
        "ours, s",
        "times faster",
        "by CPU time",
        "target",
    )
    align = ("left", *["right"] * 6)
    return tabulate(rows, headings, colalign=align, disable_numparse=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--images", type=int, help="training images; a sixth as many to test on")
    parser.add_argument("--dataset", default="mnist", help="dataset plug-in (default: mnist)")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--model", default="small_cnn", help="model plug-in (default: small_cnn)")
    parser.add_argument("--poison-rate", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=2, help="end to end (default: 2)")
    parser.add_argument("--scratch", type=Path, help="folder for PNG files (default: in memory)")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    torch.set_num_threads(1)
    root: Path = options.scratch or default_scratch()
    try:
        if min(options.repeats, options.epochs) < 1:
            raise UsageError("--repeats and --epochs must be at least 1")
        dataset = DATASETS[options.dataset]()
        source = dataset.load(LoadContext(options.data_root, offline=True))
        if options.images is not None:
            source = first(source, options.images)
        setting = Setting(
            source,
            options.model,
            RECIPES[dataset.recipe],
            options.poison_rate,
            Goal(source.num_classes),
        )
        setting.build()
        for folder in (root, options.json.parent if options.json else root):
            need_writable(folder)
        counts = sizes(setting, options.epochs)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    scores: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=root, prefix="purebench-") as place:
        runs = contestants(setting, options.epochs, Path(place), scores)
        with Progress().bar("measuring", len(runs) * options.repeats, "run") as bar:
            times = interleave(
                runs,
                options.repeats,
                lambda key, seconds: bar.step(step=", ".join(key), seconds=seconds),
            )

    circumstances = conditions() | {
        "dataset": f"{options.dataset}, {len(source.train):,} + {len(source.test):,} images",
        "model": options.model,
        "recipe": describe(setting.recipe),
        "poison_rate": options.poison_rate,
        "epochs": options.epochs,
        "repeats": options.repeats,
        "scratch": str(root),
    }
    print(table(times, counts))
    print()
    print(
        f"n = {options.repeats}, interleaved; s: by the clock; median (least .. greatest); "
        "times faster: of each round's pair, by the clock and by the process's CPU time."
    )
    print(
        f"{circumstances['machine']}, {circumstances['threads']} thread; "
        f"torch {circumstances['versions']['torch']}; {circumstances['dataset']}; "
        f"PNG files in {root}."
    )
    for name in (REFERENCE, OURS):
        acc, asr = scores[name]
        print(f"{name}, end to end: ACC {acc:.4f}, ASR {asr:.4f}")
    if options.json:
        content = {
            "conditions": circumstances,
            "scores": {name: {"acc": acc, "asr": asr} for name, (acc, asr) in scores.items()},
            "steps": {
                step: {
                    "images": count,
                    "target": TARGETS.get(step),
                    **{name: asdict(times[step, name]) for name in (REFERENCE, OURS)},
                }
                for step, count in counts.items()
            },
        }
        write_atomic(options.json, (json.dumps(content, indent=1) + "\n").encode())
        print(f"written: {options.json}")
    return 0


def first(source: Source, count: int) -> Source:
    """The first ``count`` training images, and a sixth as many test images."""
    if not 6 <= count <= len(source.train):
        raise UsageError(f"--images must be 6 to {len(source.train)}, got {count}")
    train, test = torch.arange(count), torch.arange(min(count // 6, len(source.test)))
    return Source(source.train[train], source.test[test], source.num_classes)


if __name__ == "__main__":
    sys.exit(main())
