"""GPU: how near the chip's limit a training comes, variant by variant, and what defenses take.

    python -m benchmarks.gpu [--defenses [NAME ...] | --solver]

The data are noise, resident on the device: times do not depend on what is learned. A variant is
measured by whole epochs as ``fit`` takes them, drawing and moving their chance included, after
warm-up epochs in which kernels are compiled, searched and captured; variants take turns. Its share
is of what a large bf16 matrix product reaches on this device, whatever the variant's precision.
Ctrl-C ends it, and what has been measured is told.

    --no-search: without the search for the fastest convolutions. cuDNN keeps the first plan that a
        process has for a shape, so that variants with and without it cannot take turns.

    --defenses: each defense once, on an untrained network, benign images and, where it asks for
        them, the training images of that size; what it makes of the network means nothing.
    --solver: the L1 regression of robust recovery, float32 with its finish in float64.

Precisions are compared by what a training comes to, on three seeds:

    python bench.py --attack badnets blend --defense none --dataset cifar10 \\
        --model preact_resnet18 --recipe bb100 --seeds 0 1 2 [--set bb100.precision=bf16]
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from purebench import (
    DEFENSES,
    MODELS,
    DefenseContext,
    Goal,
    Recipe,
    Split,
    Task,
    UsageError,
    machine,
)
from purebench.cli import INTERRUPTED, OK
from purebench.errors import Diverged, NotApplicable
from purebench.evaluate import Judge
from purebench.progress import Progress
from purebench.recovery.l1 import l1_regress
from purebench.seeding import isolated
from purebench.training import RECIPES, Replayed, Step, cross_entropy, precision, sgd, take_epoch

from ._timing import Spread, Times, conditions, interleave
from .l1 import Size

CLASSES = 10
QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Variant:
    """One way to take the same steps.

    fused: SGD in one kernel. graphs: replayed. compiled: the network, by torch.compile.
    deterministic: algorithms that repeat bit for bit.
    """

    name: str
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    channels_last: bool = True
    fused: bool = True
    graphs: bool = False
    compiled: bool = False
    deterministic: bool = False


VARIANTS = (
    Variant("fp32", "fp32", channels_last=False, fused=False),
    Variant("tf32", "tf32", channels_last=False, fused=False),
    Variant("bf16", channels_last=False, fused=False),
    Variant("+ channels_last", fused=False),
    Variant("+ fused SGD"),
    Variant("+ graphs: as fit does", graphs=True),
    Variant("and compiled", graphs=True, compiled=True),
    Variant("compiled, no graphs", compiled=True),
    Variant("as fit does, fp32", "fp32", graphs=True),
    Variant("as fit does, tf32", "tf32", graphs=True),
    Variant("as fit does, deterministic", graphs=True, deterministic=True),
)


@dataclass(frozen=True, eq=False)
class Bench:
    """What is trained, where, and how often.

    warm_up: epochs before any that count. epochs: measured in each of ``repeats`` rounds.
    side: of the square matrices whose product is the ceiling. search: of the fastest convolutions.
    """

    model: str
    split: Split
    recipe: Recipe
    warm_up: int
    epochs: int
    repeats: int
    side: int
    search: bool = True

    @property
    def device(self) -> torch.device:
        return self.split.images.device

    def build(self) -> nn.Module:
        with isolated(0):
            return MODELS[self.model]().build(Task.of(self.split, CLASSES)).to(self.device)

    def flops(self) -> float:
        """Of a training image: multiplications and additions, forward and backward."""
        model, part = self.build().train(), self.split[torch.arange(2)]
        with FlopCounterMode(display=False) as counter:
            cross_entropy(model, part.images / 255, part.labels).backward()
        return float(counter.get_total_flops()) / len(part)

    def ceiling(self) -> float:
        """FLOP/s of a bf16 matrix product of random numbers, the best of the rounds."""
        rng = torch.Generator().manual_seed(0)
        a, b = (
            torch.randn(self.side, self.side, generator=rng).to(self.device, torch.bfloat16)
            for _ in range(2)
        )
        count, seconds = 20, []
        for _ in range(1 + self.repeats):  # the first is for warming up
            with machine.measured(self.device) as cost:
                for _ in range(count):
                    a @ b
            seconds.append(cost.seconds)
        return 2 * self.side**3 * count / min(seconds[1:])


@dataclass
class Found:
    """Of one variant.

    times: a round's seconds. start_seconds: of the first round's warm-up.
    peak_bytes: most memory on the device, the split included. error: why it could not be measured.
    """

    times: Times = field(default_factory=Times)
    start_seconds: float = 0.0
    peak_bytes: int = 0
    error: str = ""

    def row(self, variant: Variant, bench: Bench, ceiling: float, flops: float) -> list[str]:
        if self.error:
            return [variant.name, self.error]
        if not self.times.wall_seconds:
            return [variant.name, "not measured"]
        images = bench.epochs * len(bench.split)
        rate = Spread.of([images / seconds for seconds in self.times.wall_seconds])
        model = RECIPES["bb100"].epochs * len(bench.split) / rate.median
        return [
            variant.name,
            rate.text(),
            f"{rate.median * flops / ceiling:.1%}",
            f"{model:.3g}",
            f"{self.start_seconds:.3g}",
            f"{self.peak_bytes / 2**30:.2f}",
        ]


@contextmanager
def circumstances(variant: Variant, bench: Bench) -> Iterator[Callable[[], Any]]:
    """Inside, torch works as the variant wants; the value enters autocast."""
    if variant.deterministic:
        machine.be_deterministic()
    recipe = replace(bench.recipe, precision=variant.precision)
    try:
        with precision(recipe, bench.device, bench.search) as autocast:
            yield autocast
    finally:
        torch.use_deterministic_algorithms(False)


def train(variant: Variant, bench: Bench, found: Found) -> None:
    """One round of a variant."""
    if variant.compiled:
        torch.compiler.reset()
    with circumstances(variant, bench) as autocast:
        model = bench.build().train()
        if variant.channels_last:
            model.to(memory_format=torch.channels_last)
        network = torch.compile(model, dynamic=False) if variant.compiled else model
        optimiser = sgd(bench.recipe)(list(model.parameters()))
        for group in optimiser.param_groups:
            group["fused"] = variant.fused or None  # None: what torch takes unasked

        def loss(_: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            if not variant.channels_last:
                images = images.contiguous()
            return F.cross_entropy(network(images), labels)

        recipe = replace(bench.recipe, epochs=bench.warm_up + bench.epochs)
        step = Step(model, bench.split, recipe, loss, optimiser, autocast)
        take = Replayed(step) if variant.graphs else step
        with machine.measured(bench.device) as start:
            for epoch in range(bench.warm_up):
                float(take_epoch(take, step, 0, epoch))
        found.start_seconds = found.start_seconds or start.seconds
        with found.times.measured(), machine.measured(bench.device) as cost:
            for epoch in range(bench.warm_up, recipe.epochs):
                float(take_epoch(take, step, 0, epoch))
        found.peak_bytes = max(found.peak_bytes, start.peak_memory_bytes, cost.peak_memory_bytes)


def trainings(
    bench: Bench, variants: Sequence[Variant], measuring: Measuring
) -> dict[Variant, Found]:
    """All variants in turn. One that cannot run here says why, and does not stop the others."""
    found = {variant: Found() for variant in variants}

    def run(variant: Variant, times: Times) -> None:
        mine = found[variant]
        mine.times = times
        try:
            train(variant, bench, mine)
        except Exception as error:
            mine.error = mine.error or failure(error)
            times.wall_seconds.append(math.nan)

    with measuring, Progress().bar("measuring", len(variants) * bench.repeats, "run") as bar:
        interleave(
            {variant: partial(run, variant) for variant in variants},
            bench.repeats,
            lambda variant, seconds: bar.step(variant=variant.name, seconds=seconds),
        )
    return found


class Measuring:
    """Ctrl-C ends what is measured inside, and no more. code: the command's exit code."""

    code = OK

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        if kind is not KeyboardInterrupt:
            return False
        print("interrupted: what has been measured follows", file=sys.stderr)
        self.code = INTERRUPTED
        return True


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def defend(name: str, bench: Bench, benign: int) -> list[str]:
    """One defense, once: a row of the table."""
    defense = DEFENSES[name]()
    model = bench.build().eval()
    ctx = DefenseContext(
        benign=bench.split[torch.arange(benign)],
        num_classes=CLASSES,
        recipe=bench.recipe,
        device=bench.device,
        seed=0,
        progress=QUIET,
    )
    if "training_set" in defense.needs:
        ctx.suspect = bench.split
    if "init" in defense.needs:
        ctx.initial = copy.deepcopy(model.state_dict())
    if "oracle" in defense.needs:
        judge = Judge(bench.split[torch.arange(benign)], nn.Identity(), Goal(CLASSES))
        ctx.oracle = judge.score
    said = ""
    with isolated(0), machine.measured(bench.device) as cost:
        try:
            defense.purify(model, ctx)
        except (NotApplicable, Diverged) as reason:
            said = str(reason)
        except Exception as error:
            said = failure(error)
    peak = f"{cost.peak_memory_bytes / 2**30:.2f}"
    return [name, f"{cost.seconds:.3g}", "yes" if cost.seconds > 60 else "", peak, said]


def solve(size: Size, device: torch.device, repeats: int) -> list[str]:
    """The solver at one size: a row of the table. The first round warms up."""
    A, truth, B = (tensor.to(device, torch.float32) for tensor in size.draw())
    seconds = []
    for _ in range(1 + repeats):
        with machine.measured(device) as cost:
            fit = l1_regress(A, B)
        seconds.append(cost.seconds)
    off = (fit.coefficients - truth).norm(dim=0) / truth.norm(dim=0)
    exact = fit.status.count("exact")
    peak = f"{cost.peak_memory_bytes / 2**30:.2f}"
    return [str(size), Spread.of(seconds[1:]).text(), f"{exact}", f"{float(off.max()):.1e}", peak]


def repairs() -> list[str]:
    """The defenses that train no network anew: with the field's recipe that takes minutes each."""
    return [name for name in DEFENSES.names() if "training_set" not in DEFENSES[name]().needs]


def noise(count: int, shape: tuple[int, int, int], device: torch.device) -> Split:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), generator=rng, dtype=torch.uint8)
    return Split(images, torch.arange(count) % CLASSES).to(device)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--model", default="preact_resnet18", help="(default: preact_resnet18)")
    parser.add_argument("--images", type=int, default=50_000, help="of 32x32x3 (default: 50000)")
    parser.add_argument(
        "--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
        help="of what defenses train (default: fp32)",
    )  # fmt: skip
    parser.add_argument("--warm-up", type=int, default=1, help="epochs (default: 1)")
    parser.add_argument("--epochs", type=int, default=2, help="measured in a round (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--no-search", action="store_true", help="convolutions as they come")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="names, or parts of them")
    parser.add_argument("--quick", action="store_true", help="small_cnn, 256 images, one round")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--defenses",
        nargs="*",
        metavar="NAME",
        help="time these, or all that train no network anew",
    )
    what.add_argument("--solver", action="store_true", help="time the L1 regression")
    return parser


def chosen(words: Sequence[str] | None, device: torch.device) -> list[Variant]:
    """Variants in whose name one of the words is; torch.compile is for CUDA."""
    here = [variant for variant in VARIANTS if device.type == "cuda" or not variant.compiled]
    if words is None:
        return here
    found = [variant for variant in here if any(word in variant.name for word in words)]
    if not found:
        names = ", ".join(variant.name for variant in here)
        raise UsageError(f"no variant is called {' or '.join(words)}; known: {names}")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = arguments().parse_args(words)
    if options.quick:
        options.model, options.images, options.epochs, options.repeats = "small_cnn", 256, 1, 1
    try:
        if min(options.repeats, options.epochs, options.warm_up, options.images // CLASSES) < 1:
            raise UsageError(
                f"--repeats, --epochs and --warm-up must be at least 1, --images {CLASSES}"
            )
        device = machine.pick_device(options.device)
        if options.precision != "fp32" and device.type == "cpu":
            raise UsageError(f"precision {options.precision} is for CUDA; on a CPU it is fp32")
        variants = chosen(options.variants, device)
        names = options.defenses or repairs()
        for name in names:
            DEFENSES[name]
        recipe = replace(RECIPES["bb100"], precision=options.precision)
        recipe = replace(recipe, epochs=2) if options.quick else recipe
        bench = Bench(
            options.model, noise(options.images, (3, 32, 32), device), recipe,
            options.warm_up, options.epochs, options.repeats, 256 if options.quick else 8192,
            not options.no_search,
        )  # fmt: skip
        bench.build()
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    measuring = Measuring()
    if options.solver:
        sizes = [Size(96, 12, 8, 0.1)] if options.quick else [Size(4608, 500, 512, 0.3)]
        rows = [solve(size, device, options.repeats) for size in sizes]
        heads = ["p x n, r, eps", "seconds", "exact", "worst relative error", "GiB"]
        print(tabulate(rows, heads, disable_numparse=True))
        print(f"\nfloat32; n = {options.repeats} after one to warm up: median (least .. greatest)")
    elif options.defenses is not None:
        benign = max(2 * CLASSES, len(bench.split) // 20)
        heads = ["defense", "seconds", "> 60", "GiB", ""]
        rows = []
        with measuring, Progress().bar("timing", len(names), "defense") as bar:
            for name in names:
                rows.append(defend(name, bench, benign))
                bar.step(defense=name, seconds=rows[-1][1])
        print(tabulate(rows, heads, disable_numparse=True))
        print(
            f"\n{options.model}, untrained; {benign:,} benign images, {len(bench.split):,} to "
            f"train on; recipe of {recipe.epochs} epochs, {recipe.precision}; n = 1, not warmed up"
        )
    else:
        ceiling, flops = bench.ceiling(), bench.flops()
        work = flops * RECIPES["bb100"].epochs * len(bench.split)
        print(
            f"{options.model}, {flops / 1e9:.3g} GFLOP a training image; s a model: 100 epochs of "
            f"{len(bench.split):,} images, {work / 1e15:.3g} PFLOP, at least {work / ceiling:.3g} "
            f"s at the ceiling, {ceiling / 1e12:.4g} TFLOP/s (bf16, {bench.side} x {bench.side})\n",
            flush=True,
        )
        found = trainings(bench, variants, measuring)
        rounds = {len(each.times.wall_seconds) for each in found.values()}
        heads = ["variant", "images/s", "of ceiling", "s a model", "start, s", "GiB"]
        rows = [found[variant].row(variant, bench, ceiling, flops) for variant in variants]
        print(tabulate(rows, heads, disable_numparse=True))
        print(
            f"\nn = {' to '.join(map(str, sorted({min(rounds), max(rounds)})))}, interleaved, "
            f"{bench.epochs} epochs each after {bench.warm_up} to warm up (start, of the first "
            f"round): median (least .. greatest); batches of {bench.recipe.batch_size}; "
            f"convolutions {'searched' if bench.search else 'as they come'}."
        )
    about = conditions()
    torch_version, commit = about["versions"]["torch"], about["commit"]
    print(f"{machine.device_name(device)}; torch {torch_version}; commit {commit}.")
    return measuring.code


if __name__ == "__main__":
    sys.exit(main())
