"""Runner: a plan of cells -> cached victims -> purify -> judge -> one record a cell.

A finished record that can be read is the only success: what is there is not run again.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import interrupt, machine
from .artifact import CARD, Damaged, load_artifact, save_artifact
from .attack import Attack, AttackContext, BackdooredModel, Goal, PoisoningAttack
from .config import RunConfig
from .data import (
    DataBundle,
    Dataset,
    LoadContext,
    Source,
    Split,
    make_bundle,
    stratified,
    to_float,
)
from .defense import NEEDS, Defense, DefenseContext
from .errors import DiskFull, Diverged, NotApplicable, UsageError, near_match
from .evaluate import Judge
from .model import Architecture, Task
from .progress import Progress
from .reactivation import poisoned_samples, reactivated
from .record import PROTOCOL, Cell, Record, Status, Unreadable, read_record
from .registry import ATTACKS, DATASETS, DEFENSES, MODELS, Registry, answering, load_plugin
from .savepoint import Savepoints
from .scores import Scores, checked_stealth
from .seeding import derive, generator, isolated
from .settings import build, canonical, changed, describe, fingerprint
from .stealth import stealth
from .storage import locked, need_writable, set_aside, sha256, write_atomic
from .training import RECIPES, Recipe

STEALTH = "stealth.json"
_COMPARED = 1000  # triggered test images that are compared with their clean ones
_MOST_NOTES, _MOST_TEXT = 2**19, 2000  # bytes of a defense's notes, characters of an error
ENGINE = 1  # part of every fingerprint: raised when training or judging changes results


@dataclass(frozen=True, eq=False)
class Plan:
    """A run, checked: everything is built and known to fit; nothing has been trained."""

    config: RunConfig
    device: torch.device
    dataset: Dataset
    source: Source
    digest: str
    architecture: Architecture
    recipe_name: str
    recipe: Recipe
    attacks: tuple[Attack, ...]
    defenses: tuple[Defense, ...]
    progress: Progress

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def cell_count(self) -> int:
        return len(self.attacks) * len(self.defenses) * len(self.config.seeds)

    def goal(self) -> Goal:
        return Goal(self.source.num_classes, self.config.target, self.config.all_to_all)

    def rate(self, attack: Attack) -> float:
        given = self.config.poison_rate
        return attack.poison_rate if given is None or is_control(attack) else given

    def reactivates(self, attack: Attack) -> bool:
        """Whether purified networks are to be judged reactivated, too."""
        return self.config.reactivate and not is_control(attack)

    def only(self, attack: str, seed: int) -> Plan:
        """The part of it that is about one victim."""
        attacks = tuple(plugin for plugin in self.attacks if plugin.name == attack)
        config = dataclasses.replace(self.config, seeds=(seed,))
        return dataclasses.replace(self, config=config, attacks=attacks)

    def bundle(self, seed: int) -> DataBundle:
        return make_bundle(
            self.dataset.name,
            self.source,
            seed=seed,
            benign_fraction=self.config.benign_fraction,
            held_out=self.config.benign_source == "held_out",
        )

    def changed(self, attack: Attack, defense: Defense) -> dict[str, list[str]]:
        """Part of a cell -> its settings that are not the defaults."""
        plugins = {
            "dataset": self.dataset,
            "model": self.architecture,
            "attack": attack,
            "defense": defense,
        }
        parts = {name: changed(plugin) for name, plugin in plugins.items()}
        parts["recipe"] = changed(self.recipe, RECIPES[self.recipe_name])
        return {name: settings for name, settings in parts.items() if settings}

    def cell(self, attack: Attack, defense: Defense, seed: int) -> Cell:
        return Cell(
            dataset={**_identity(self.dataset), "digest": self.digest},
            model=_identity(self.architecture),
            attack={**_identity(attack), "revision": attack.revision},
            defense={**_identity(defense), "revision": defense.revision},
            recipe={"name": self.recipe_name, "settings": describe(self.recipe)},
            seed=seed,
            poison_rate=self.rate(attack),
            clean_label=attack.clean_label,
            target=self.config.target,
            all_to_all=self.config.all_to_all,
            benign_fraction=self.config.benign_fraction,
            benign_source=self.config.benign_source,
        )


def is_control(attack: Attack) -> bool:
    """Whether it poisons nothing, so that there is no trigger."""
    return attack.poison_rate == 0


def _identity(plugin: Any) -> dict[str, Any]:
    return {"name": plugin.name, "settings": describe(plugin)}


def victim_identity(cell: Cell) -> dict[str, Any]:
    """What a backdoored model depends on: the cell without the defense, and without the benign
    draw unless that was kept out of training."""
    identity = dataclasses.asdict(cell)
    del identity["defense"]
    if cell.benign_source == "train":
        del identity["benign_fraction"]
    return {**identity, "engine": ENGINE}


def prepare(config: RunConfig, progress: Progress) -> Plan:
    """Check a run whole before anything is trained.

    Raises UsageError for whatever cannot be run: names, settings, shapes, rates, files, folders.
    """
    output = Path(config.output)
    if (output / "purebench").is_dir() and (output / "bench.py").is_file():
        raise UsageError(f"--output {config.output} is the checkout itself: name another folder")
    for file in config.plugin:
        load_plugin(file)
    unused = dict(config.set)
    attacks = tuple(_make(ATTACKS, name, unused) for name in _chosen(ATTACKS, config.attack))
    names = config.defense or _quick_defenses()
    defenses = tuple(_make(DEFENSES, name, unused) for name in _chosen(DEFENSES, names))
    dataset = _make(DATASETS, config.dataset, unused)
    architecture = _make(MODELS, config.model, unused)
    recipe_name = config.recipe or dataset.recipe
    if recipe_name not in RECIPES:
        raise UsageError(f"unknown recipe {recipe_name!r}{near_match(recipe_name, RECIPES)}")
    base = RECIPES[recipe_name]
    recipe = build(Recipe, unused.pop(recipe_name, {}), f"recipe {recipe_name}", base)
    if unused:
        parts = [plugin.name for plugin in (*attacks, *defenses, dataset, architecture)]
        name = min(unused)
        raise UsageError(
            f"setting {name}.{min(unused[name])}: {name!r} is no part of this run"
            f"{near_match(name, [*parts, recipe_name])}"
        )
    torch.set_num_threads(config.threads)
    device = machine.pick_device(config.device)
    if config.deterministic and device.type == "cuda":
        machine.be_deterministic()
    if recipe.precision != "fp32" and device.type == "cpu":
        raise UsageError(f"precision {recipe.precision} is for CUDA; on a CPU it is fp32")
    with answering("dataset", dataset):
        source = dataset.load(LoadContext(Path(config.data_root), config.offline, progress))
    _check_source(dataset.name, source)
    plan = Plan(
        config, device, dataset, source, source.digest(), architecture, recipe_name, recipe,
        attacks, defenses, progress,
    )  # fmt: skip
    for seed in config.seeds:
        train = plan.bundle(seed).train
    for attack in attacks:
        with answering("attack", attack):
            attack.check(train.labels, plan.goal(), plan.rate(attack))
            aim = attack.aim(plan.goal())
            trigger = attack.make_trigger(train.shape, torch.Generator().manual_seed(0))
        if not aim.eligible(source.test.labels).any():
            raise UsageError(
                f"attack {attack.name}: no test image can tell its ASR: there is none of a class "
                "that is to be taken for the target"
            )
        if not isinstance(trigger, nn.Module):
            raise UsageError(
                f"attack {attack.name}: make_trigger returned {type(trigger).__name__}, expected a "
                "network"
            )
    for defense in defenses:
        if unknown := {*defense.needs} - NEEDS:
            raise UsageError(
                f"defense {defense.name}: nobody can give it {min(unknown)!r}; needs are of "
                f"{', '.join(sorted(NEEDS))}"
            )
    _check_fit(plan)
    for folder in ("models", "records", "tables"):
        need_writable(plan.output / folder)
    return plan


def _chosen(registry: Registry[Any], names: Sequence[str]) -> Sequence[str]:
    if "all" in names:  # an oracle runs where it is named
        return [name for name in registry.names() if not name.endswith("_oracle") or name in names]
    if not names:
        raise UsageError(f"name at least one {registry.kind}: {', '.join(registry.names())}")
    return names


def _quick_defenses() -> list[str]:
    return [name for name in DEFENSES.names() if DEFENSES[name].default]


def _make(registry: Registry[Any], name: str, unused: dict[str, Any]) -> Any:
    return build(registry[name], unused.pop(name, {}), f"{registry.kind} {name}")


def _check_source(name: str, source: Source) -> None:
    if not isinstance(source, Source):
        raise UsageError(
            f"dataset {name}: load returned {type(source).__name__}, expected a Source"
        )
    there = set(source.train.labels.unique().tolist())
    if missing := [label for label in range(source.num_classes) if label not in there]:
        raise UsageError(
            f"dataset {name}: no training image of class {', '.join(map(str, missing[:20]))}; are "
            "labels numbered from 0?"
        )
    for part, split in (("training", source.train), ("test", source.test)):
        wrong = split.labels[(split.labels < 0) | (split.labels >= source.num_classes)]
        if len(wrong):
            values = ", ".join(map(str, wrong.unique()[:20].tolist()))
            raise UsageError(
                f"dataset {name}: {len(wrong)} {part} labels lie outside 0 to "
                f"{source.num_classes - 1}: {values}"
            )
        if split.shape != source.train.shape or not len(split):
            raise UsageError(
                f"dataset {name}: {len(split)} {part} images of {tuple(split.shape)}, training "
                f"images are {tuple(source.train.shape)}"
            )


def _check_fit(plan: Plan) -> None:
    task = Task.of(plan.source.train, plan.source.num_classes)
    name, shape = plan.architecture.name, "x".join(map(str, task.shape))
    images = to_float(plan.source.train.images[:2])
    with answering("model", plan.architecture), isolated(0), torch.no_grad():
        try:
            model = plan.architecture.build(task)
            logits = model.eval()(images) if isinstance(model, nn.Module) else None
        except (ValueError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(f"model {name} does not fit {shape} images: {reason}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name}: build returned {type(model).__name__}, expected a network")
    if wrong := _no_logits(logits, len(images), task.num_classes):
        raise UsageError(f"model {name} {wrong}")


def _no_logits(given: Any, count: int, num_classes: int) -> str:
    """What is wrong with what a network gives for so many images; empty where nothing is."""
    found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    wanted = (count, num_classes)
    return "" if found == wanted else f"gives {found} for {count} images, expected {wanted}"


class Victim:
    """The backdoored model that an attack and a seed lead to: from the cache, or trained now."""

    def __init__(self, plan: Plan, attack: Attack, seed: int) -> None:
        self.plan, self.attack, self.seed = plan, attack, seed
        self.identity = victim_identity(plan.cell(attack, plan.defenses[0], seed))
        self.fingerprint = fingerprint(self.identity)
        self.folder = plan.output / "models" / f"{attack.name}-s{seed}-{self.fingerprint}"
        self.failure: BaseException | None = None

    @property
    def trained(self) -> bool:
        """Whether its network is kept."""
        return (self.folder / CARD).is_file()

    def forget(self) -> None:
        """Keep nothing of it, so that it is trained anew."""
        (self.folder / CARD).unlink(missing_ok=True)
        self._savepoints().clear()

    @cached_property
    def bundle(self) -> DataBundle:
        return self.plan.bundle(self.seed)

    @cached_property
    def task(self) -> Task:
        return Task.of(self.plan.source.train, self.plan.source.num_classes)

    def build(self) -> nn.Module:
        """The network before training, on the plan's device."""
        with isolated(derive(self.seed, "init", self.plan.architecture.name)):
            model = self.plan.architecture.build(self.task)
        return model.to(self.plan.device)

    @cached_property
    def attack_context(self) -> AttackContext:
        return AttackContext(
            train=self.bundle.train.to(self.plan.device),
            task=self.task,
            goal=self.plan.goal(),
            build=self.build,
            poison_rate=self.plan.rate(self.attack),
            recipe=self.plan.recipe,
            device=self.plan.device,
            seed=derive(self.seed, "attack", self.attack.name),
            progress=self.plan.progress,
        )

    @cached_property
    def model(self) -> BackdooredModel:
        """From the cache where a whole, matching artifact lies there; else trained and kept, by one
        process at a time. What failed once fails for every defense, without another try."""
        if self.failure is not None:
            raise self.failure
        lock = self.folder.with_name(f"{self.folder.name}.lock")
        with locked(lock, self.plan.progress.say):
            return self._found_or_trained()

    def _found_or_trained(self) -> BackdooredModel:
        fresh = self.plan.config.force
        try:
            found = None if fresh else self._load()
        except Damaged as reason:
            place = set_aside(self.folder)
            self.plan.progress.say(f"{self.folder.name} is damaged ({reason}): kept as {place}")
            self.plan.progress.say(f"training {self.attack.name} again")
            found = None
        try:
            return found or self._train()
        except (Exception, SystemExit) as error:
            self.failure = error
            raise

    def _load(self) -> BackdooredModel | None:
        def blank() -> tuple[nn.Module, nn.Module]:
            shape = torch.Size(self.task.shape)
            trigger = self.attack.make_trigger(shape, torch.Generator().manual_seed(0))
            return self.build(), trigger

        train = self.plan.source.train
        most = train.images.nbytes + 3 * train.labels.nbytes
        return load_artifact(self.folder, self.identity, blank, self.plan.device, most)

    def _train(self) -> BackdooredModel:
        seed = derive(self.seed, "attack", self.attack.name, "global")
        savepoints = self._savepoints()
        if self.plan.config.force:
            savepoints.clear()
        ctx = dataclasses.replace(self.attack_context, savepoints=savepoints)
        try:
            with isolated(seed), torch.enable_grad(), machine.measured(self.plan.device) as cost:
                victim = self.attack.run(ctx)
        except (Diverged, NotApplicable):  # it would end so again
            savepoints.clear()
            raise
        victim.notes["training_seconds"] = round(savepoints.earlier_seconds + cost.seconds, 3)
        (self.folder / STEALTH).unlink(missing_ok=True)  # of the network that this one replaces
        save_artifact(self.folder, victim, self.identity)
        savepoints.clear()
        return victim

    def _savepoints(self) -> Savepoints:
        identity = {
            "victim": self.identity,
            "code": _code(self.attack, self.plan.architecture),
            "versions": machine.versions(),
            "device": machine.device_name(self.plan.device),
            "threads": torch.get_num_threads(),
        }
        folder = self.folder.with_name(f"{self.folder.name}.unfinished")
        return Savepoints(folder, identity, self.plan.device, self.plan.progress)

    @cached_property
    def judge(self) -> Judge:
        test = self.bundle.test.to(self.plan.device)
        return Judge(test, self.model.trigger, self.model.goal)

    @cached_property
    def scores(self) -> Scores:
        """Undefended."""
        return self.judge.score(self.model.model)

    @cached_property
    def stealth(self) -> dict[str, float]:
        """Of a sample of the triggered test images; kept beside the network. Empty where there is
        no trigger."""
        if is_control(self.attack):
            return {}
        marked = self.judge.triggered
        file = self.folder / STEALTH
        try:
            return checked_stealth(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError):
            clean = self.judge.test.images[self.judge.eligible]
            count = min(_COMPARED, len(marked))
            rng = generator(self.seed, "stealth")
            drawn = stratified(marked.labels, count, self.task.num_classes, rng)
            drawn = drawn.to(self.plan.device)
            found = stealth(clean[drawn], marked.images[drawn])
            write_atomic(file, (json.dumps(found) + "\n").encode())
            return found

    @cached_property
    def samples(self) -> Split:
        """A handful of poisoned training images, to reactivate a purified network with."""
        train, trigger, goal = self.attack_context.train, self.model.trigger, self.model.goal
        return poisoned_samples(train, trigger, goal, derive(self.seed, "reactivation"))

    def reactivated(self, purified: nn.Module) -> Scores:
        """Of a copy of ``purified``, after a few steps on ``samples``."""
        seed = derive(self.seed, "reactivation", "training")
        with isolated(seed):
            return self.judge.score(reactivated(purified, self.samples, seed))

    @cached_property
    def benign(self) -> Split:
        return self.bundle.benign.to(self.plan.device)

    def poisoned_split(self) -> Split:
        """What the network was trained on, as the artifact holds it: making it again would train
        an attack's surrogate again."""
        if self.model.planted is not None:
            return self.model.planted.into(self.attack_context.train)
        if isinstance(self.attack, PoisoningAttack):  # an artifact older than ``planted``
            return self.attack.poison(self.attack_context)[0]
        raise NotApplicable(f"{self.attack.name} leaves no poisoned training set")

    def defender(self, defense: Defense) -> DefenseContext:
        """What ``defense`` gets to see."""
        suspect = initial = oracle = None
        if "training_set" in defense.needs:
            suspect = self.poisoned_split()
        if "init" in defense.needs:
            initial = {name: value.clone() for name, value in self.build().state_dict().items()}
        if "oracle" in defense.needs and defense.name.endswith("_oracle"):
            oracle = self.judge.score
        return DefenseContext(
            benign=Split(self.benign.images.clone(), self.benign.labels.clone()),
            num_classes=self.plan.source.num_classes,
            recipe=self.plan.recipe,
            device=self.plan.device,
            seed=derive(self.seed, "defense", defense.name),
            progress=self.plan.progress.without_lines(),
            suspect=suspect,
            initial=initial,
            oracle=oracle,
        )


def record_path(plan: Plan, cell: Cell) -> Path:
    """Where the record of ``cell`` lies."""
    board = f"{cell.dataset['name']}-{cell.model['name']}"
    name = f"{cell.attack['name']}-{cell.defense['name']}-s{cell.seed}-{cell_fingerprint(cell)}"
    return plan.output / "records" / board / f"{name}.json"


def cell_fingerprint(cell: Cell) -> str:
    return fingerprint({**dataclasses.asdict(cell), "engine": ENGINE, "protocol": PROTOCOL})


def execute(
    plan: Plan,
    done: Callable[[Record, Path, bool], None] | None = None,
    begin: Callable[[Cell, Path], bool] | None = None,
) -> Iterator[Record]:
    """Run the plan's cells in order and yield their records. A cell is run by one process at a
    time: another one waits, and takes its record. A Ctrl-C that is kept ends it between two cells.

    Args:
        done: told of each record, its file, and whether it was there before.
        begin: told of each cell before it, and its record's file; False leaves it out.
    """
    for seed in plan.config.seeds:
        for attack in plan.attacks:
            victim = Victim(plan, attack, seed)
            for defense in plan.defenses:
                cell = plan.cell(attack, defense, seed)
                path = record_path(plan, cell)
                interrupt.check()
                with locked(path.with_suffix(".lock"), plan.progress.say):
                    if begin is not None and not begin(cell, path):
                        continue
                    found = None if plan.config.force else _found(path, cell, plan.progress)
                    if found and not is_done(found, plan.reactivates(attack)):
                        found = None
                    record = found or run_cell(victim, defense)
                    if found is None:
                        record.write(path)
                if found is not None and found.machine.get("sources") != _sources(attack, defense):
                    plan.progress.say(
                        f"{path.stem}: the code of {attack.name} or {defense.name} has changed "
                        "since; --force runs it again, raising `revision` does so for everyone"
                    )
                if done is not None:
                    done(record, path, found is not None)
                yield record


def _found(path: Path, cell: Cell, progress: Progress) -> Record | None:
    try:
        record = read_record(path)
        if record.cell != cell:
            raise Unreadable(f"{path}: its cell is not the one that it is named for")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except Unreadable as reason:
        progress.say(f"{reason}: kept as {set_aside(path).name}, run again")
        return None
    return record


def is_done(record: Record, reactivates: bool) -> bool:
    """Whether nothing that is asked for is missing in it."""
    lacks = reactivates and record.status == "ok" and record.reactivated is None
    return record.finished and not lacks


def crashed(cell: Cell, reason: str) -> Record:
    """The record of a cell whose process did not live to write one."""
    victim = fingerprint(victim_identity(cell))
    return Record(cell, cell_fingerprint(cell), victim, "failed", error=reason)


@torch.inference_mode()
def _check_logits(network: nn.Module, images: Tensor, num_classes: int) -> None:
    """Refuse what is no classifier of these classes: its ASR may be 0 for want of the target."""
    if wrong := _no_logits(network(to_float(images)), len(images), num_classes):
        raise TypeError(f"purify returned a network that {wrong}")


def run_cell(victim: Victim, defense: Defense) -> Record:
    """Purify a private copy of the victim and judge it. Whatever raises becomes a record."""
    plan = victim.plan
    cell = plan.cell(victim.attack, defense, victim.seed)
    before = after = again = None
    status: Status = "ok"
    error: str | None = None
    notes: dict[str, Any] = {}
    cost = machine.Cost()
    timings: dict[str, float] = {}
    attack_notes: dict[str, Any] = {}
    distances: dict[str, float] = {}
    try:
        attack_notes, before = victim.model.notes, victim.scores
        distances = victim.stealth
        if before.diverged:
            raise Diverged("the undefended network's logits are not finite")
        ctx = victim.defender(defense)
        suspect = copy.deepcopy(victim.model.model)
        seed = derive(victim.seed, "defense", defense.name, "global")
        with isolated(seed), torch.enable_grad(), machine.measured(plan.device) as cost:
            try:
                purified = defense.purify(suspect, ctx)
            finally:
                notes, timings = ctx.notes, ctx.timings
        if not isinstance(purified, nn.Module):
            raise TypeError(f"purify returned {type(purified).__name__}, expected a network")
        _check_logits(purified.eval(), victim.judge.test.images[:2], victim.task.num_classes)
        if ctx.verdict is not None:
            notes["detection"] = ctx.verdict.against(victim.model.poisoned)
        after = victim.judge.score(purified)
        if after.diverged:
            raise Diverged(f"{after.nonfinite_count} images have logits that are not finite")
        if plan.reactivates(victim.attack):
            again = victim.reactivated(purified)
    except NotApplicable as reason:
        status, error = "skipped", str(reason)
    except Diverged as reason:
        status, error = "diverged", str(reason)
    except DiskFull:
        raise
    except (Exception, SystemExit) as reason:  # one cell's failure is not its neighbours'
        text = " ".join(str(reason).split())
        text = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
        status, error = "failed", f"{type(reason).__name__}{': ' if text else ''}{text}"
        if isinstance(reason, torch.OutOfMemoryError):
            error = f"out of memory, with batches as they are set: {text}"
        told = traceback.format_exc().replace(f"{Path(__file__).parents[1]}{os.sep}", "")
        lines = told.splitlines()[-12:]  # records are shown around: no folder of ours
        notes = notes if isinstance(notes, dict) else {}
        notes["traceback"] = [line[:_MOST_TEXT] for line in lines]
        traceback.clear_frames(reason.__traceback__)  # and what they hold of the device's memory
    if wrong := _unwritable(notes, timings):
        status, error, notes, timings = "failed", wrong, {}, {}
    return Record(
        cell=cell,
        fingerprint=cell_fingerprint(cell),
        victim=victim.fingerprint,
        status=status,
        before=before,
        after=after,
        benign_count=len(victim.bundle.benign),
        error=error,
        changed=plan.changed(victim.attack, defense),
        notes=notes,
        victim_notes={k: v for k, v in attack_notes.items() if k != "training_seconds"},
        stealth=distances,
        reactivated=again,
        cost={
            "seconds": round(cost.seconds, 4),
            "peak_memory_bytes": cost.peak_memory_bytes,
            "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
            "training_seconds": attack_notes.get("training_seconds", 0.0),
        },
        machine={
            "device": str(plan.device.type),
            "name": machine.device_name(plan.device),
            "threads": torch.get_num_threads(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "sources": _sources(victim.attack, defense),
        },
    )


def _unwritable(notes: Any, timings: Any) -> str:
    """What is wrong with what a defense noted, for a record; "" where nothing is."""
    for name, found in (("notes", notes), ("timings", timings)):
        if not isinstance(found, dict):
            return f"ctx.{name} must be a dict, got {type(found).__name__}"
    where = ""
    try:
        for key, value in notes.items():
            where = f"[{key!r}]"
            canonical({key: value})
        where = ""
        size = len(canonical(notes))  # its keys are sorted, which not all keys can be
    except (TypeError, ValueError) as reason:
        return f"ctx.notes{where} cannot be written as JSON: {reason}"
    if size > _MOST_NOTES:
        return f"ctx.notes are {size:,} bytes as JSON, at most {_MOST_NOTES:,} go into a record"
    for key, value in timings.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)  # numpy's, too
        if not number or not 0 <= value < math.inf or not isinstance(key, str):
            return f"ctx.timings[{key!r}] must be seconds, 0 or more, got {str(value)[:40]!r}"
    return ""


def _sources(*plugins: Any) -> list[str]:
    """Short digests of the plug-ins' files, to notice that a record is older than the code."""
    files = [inspect.getsourcefile(type(plugin)) for plugin in plugins]
    return [
        hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "" for file in files
    ]


def _code(*plugins: Any) -> str:
    """Digest of the engine's files and of all that lie beside the plug-ins'."""
    files = [inspect.getsourcefile(type(plugin)) for plugin in plugins]
    folders = {Path(__file__).parent, *(Path(file).parent for file in files if file)}
    texts = [
        file.read_bytes() for folder in sorted(folders) for file in sorted(folder.glob("*.py"))
    ]
    return sha256(b"".join(texts))
