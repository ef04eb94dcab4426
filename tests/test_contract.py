"""Every plug-in keeps its contract, and every check catches a plug-in that would not."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from purebench import (
    ATTACKS,
    DATASETS,
    DEFENSES,
    MODELS,
    Architecture,
    Attack,
    AttackContext,
    BackdooredModel,
    Defense,
    DefenseContext,
    LoadContext,
    Normalise,
    NotApplicable,
    PoisoningAttack,
    Split,
    Task,
    UsageError,
)
from purebench import contract as c
from purebench.data import Dataset, Source

DATA = LoadContext(Path("data"), offline=True)


@pytest.fixture
def few(attacker: AttackContext) -> AttackContext:
    """The attacker with 200 images and one epoch: no check asks whether the attack took."""
    images, labels = attacker.train.images[:200], attacker.train.labels[:200]
    recipe = replace(attacker.recipe, epochs=1)
    return replace(attacker, train=Split(images.clone(), labels.clone()), recipe=recipe)


@pytest.fixture
def holder(defender: DefenseContext) -> DefenseContext:
    """The defender with 150 images of its own: checks ask for little, and may be cheated."""
    images, labels = defender.benign.images[:150], defender.benign.labels[:150]
    return replace(defender, benign=Split(images.clone(), labels.clone()))


# --- the plug-ins that are there ----------------------------------------------------------------


@pytest.mark.parametrize("check", c.DEFENSE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", DEFENSES.names())
def test_defense(
    name: str, check: c.DefenseCheck, victim: BackdooredModel, holder: DefenseContext
) -> None:
    try:
        check(DEFENSES[name], victim, holder)
    except NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("check", c.ATTACK_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ATTACKS.names())
def test_attack(name: str, check: c.AttackCheck, few: AttackContext) -> None:
    try:
        check(ATTACKS[name], few)
    except NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("check", c.MODEL_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", MODELS.names())
def test_model(name: str, check: c.ModelCheck) -> None:
    try:
        check(MODELS[name], Task((3, 32, 32), 10, (0.5,) * 3, (0.25,) * 3))
    except ValueError:  # a network for small grey images alone
        check(MODELS[name], Task((1, 28, 28), 10, (0.1,), (0.3,)))


@pytest.mark.parametrize("check", c.DATASET_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", DATASETS.names())
def test_dataset(name: str, check: c.DatasetCheck) -> None:
    try:
        check(DATASETS[name], DATA)
    except UsageError as missing:  # a download, or the user's own files
        if name in ("mnist", "shapes"):
            raise
        pytest.skip(str(missing))


# --- broken ones --------------------------------------------------------------------------------


def doing(act: Callable[[Any, DefenseContext], Any]) -> type[Defense]:
    """Does ``act`` to the network, then returns it."""

    @dataclass(frozen=True)
    class Broken(Defense):
        paper: ClassVar[str] = "none"

        def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
            act(model, ctx)
            return model

    return Broken


def returning(change: Callable[[Any], Any]) -> type[Defense]:
    """Returns something else than the network."""

    @dataclass(frozen=True)
    class Broken(Defense):
        paper: ClassVar[str] = "none"

        def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
            changed: nn.Module = change(model)
            return changed

    return Broken


class Undecorated(Defense):
    """Its author forgot the decorator: strength cannot be set."""

    strength: float = 1.0

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        return model


@dataclass
class Mutable:
    strength: float = 1.0


@dataclass(frozen=True)
class NeedsArgument:
    strength: float


@dataclass(frozen=True)
class HoldsTensor:
    weight: Tensor = field(default_factory=lambda: torch.ones(2))


@dataclass(frozen=True)
class RefusesItsDefault:
    strength: float = -1.0

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError("strength must not be negative")


@pytest.mark.parametrize(
    "cls", [Undecorated, Mutable, NeedsArgument, HoldsTensor, RefusesItsDefault]
)
def test_settings_are_data_catches(cls: type[Any]) -> None:
    with pytest.raises(AssertionError, match=cls.__name__):
        c.settings_are_data(cls)


def _freeze(model: Any, _: object) -> None:
    model.conv1.weight.requires_grad_(False)


def _spoil(model: Any, _: object) -> None:
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = torch.nan


def _nothing(*_: object) -> None:
    """A hook."""


def needing(called: str, runs: bool, *what: str) -> type[Defense]:
    """Registered as ``called``; ``runs`` by default."""

    @dataclass(frozen=True)
    class Broken(Defense):
        paper: ClassVar[str] = "none"
        name: ClassVar[str] = called
        default: ClassVar[bool] = runs
        needs: ClassVar[frozenset[str]] = frozenset(what)

        def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
            return model

    return Broken


BAD_DEFENSES: list[tuple[c.DefenseCheck, type[Defense]]] = [
    (c.declares_what_it_needs, needing("peeking", False, "oracle")),
    (c.declares_what_it_needs, needing("peeking_oracle", True, "oracle")),
    (c.declares_what_it_needs, needing("honest_oracle", False)),
    (c.declares_what_it_needs, needing("wishing", False, "test")),
    (c.gives_finite_logits, doing(_spoil)),
    (c.gives_finite_logits, returning(lambda model: "purified")),
    (c.gives_finite_logits, returning(lambda model: model[:-1])),
    (c.gives_finite_logits, returning(lambda model: model.to("meta"))),
    (c.keeps_clean_accuracy, doing(lambda model, _: nn.init.zeros_(model[-1].weight))),
    (c.same_seed_same_weights, doing(lambda model, _: nn.init.normal_(model[-1].weight))),
    (c.leaves_no_hooks, doing(lambda model, _: model[1].register_forward_hook(_nothing))),
    (c.leaves_no_hooks, doing(lambda model, _: model.register_forward_pre_hook(_nothing))),
    (c.leaves_no_hooks, doing(lambda model, _: model.register_full_backward_hook(_nothing))),
    (c.leaves_no_hooks, doing(lambda model, _: model.register_full_backward_pre_hook(_nothing))),
    (c.leaves_generators, doing(lambda *_: torch.rand(1))),
    (c.leaves_generators, doing(lambda *_: np.random.seed(0))),
    (c.leaves_generators, doing(lambda *_: random.random())),
    (c.leaves_weights_trainable, doing(_freeze)),
    (c.leaves_weights_trainable, doing(lambda *_: torch.set_grad_enabled(False))),
    (c.leaves_its_data, doing(lambda _, ctx: ctx.benign.images.zero_())),
    (c.leaves_its_data, doing(lambda _, ctx: ctx.benign.labels.zero_())),
    (c.writes_nothing, doing(lambda *_: print("purified"))),
    (c.writes_nothing, doing(lambda *_: open(os.devnull, "w").close())),
    (c.writes_nothing, doing(lambda *_: Path(os.devnull).write_text(""))),
    (c.writes_nothing, doing(lambda *_: os.close(os.open(os.devnull, os.O_WRONLY)))),
    (c.notes_are_data, doing(lambda _, ctx: ctx.notes.update(shift=torch.ones(1)))),
    (c.notes_are_data, doing(lambda _, ctx: ctx.notes.update(shift=torch.nan))),
]


@pytest.fixture
def _gradients() -> Iterator[None]:
    """One broken defense switches them off."""
    yield
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("_gradients")
@pytest.mark.parametrize(("check", "broken"), BAD_DEFENSES)
def test_defense_check_catches(
    check: c.DefenseCheck, broken: type[Defense], victim: BackdooredModel, holder: DefenseContext
) -> None:
    with pytest.raises(AssertionError):
        check(broken, victim, holder)


class Stamp(nn.Module):
    """Images plus a pattern; ``kept`` decides whether the pattern is saved."""

    def __init__(self, pattern: Tensor, kept: bool = True) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern, persistent=kept)

    def forward(self, images: Tensor) -> Tensor:
        pattern: Tensor = self.pattern  # type: ignore[assignment]
        return (images + pattern).clamp(0, 1)


class Apply(nn.Module):
    """Images through a function."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(images)


@dataclass(frozen=True)
class Sound(PoisoningAttack):
    """The broken attacks below each break one thing of it."""

    paper: ClassVar[str] = "none"

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        return Stamp(torch.rand(shape, generator=rng))


@pytest.mark.parametrize("check", c.ATTACK_CHECKS, ids=lambda check: check.__name__)
def test_sound_attack(check: c.AttackCheck, few: AttackContext) -> None:
    check(Sound, few)


def triggering(make: Callable[[torch.Size, torch.Generator], nn.Module]) -> type[Attack]:
    @dataclass(frozen=True)
    class Broken(Sound):
        def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
            return make(shape, rng)

    return Broken


def poisoning(change: Callable[[Split, Tensor], tuple[Split, Tensor]]) -> type[Attack]:
    @dataclass(frozen=True)
    class Broken(Sound):
        def poison(self, ctx: AttackContext) -> tuple[Split, Tensor, nn.Module]:
            split, poisoned, trigger = super().poison(ctx)
            return *change(split, poisoned), trigger

    return Broken


def running(change: Callable[[BackdooredModel, AttackContext], Any]) -> type[Attack]:
    @dataclass(frozen=True)
    class Broken(Sound):
        def run(self, ctx: AttackContext) -> BackdooredModel:
            victim = super().run(ctx)
            change(victim, ctx)
            return victim

    return Broken


def _unpoisoned(split: Split, poisoned: Tensor) -> Tensor:
    """Index of an image that is not poisoned."""
    return torch.tensor([index for index in range(len(split)) if index not in poisoned][:1])


def _change_elsewhere(part: str) -> type[Attack]:
    def change(split: Split, poisoned: Tensor) -> tuple[Split, Tensor]:
        getattr(split, part)[_unpoisoned(split, poisoned)] ^= 1
        return split, poisoned

    return poisoning(change)


def _keep_labels(split: Split, poisoned: Tensor) -> tuple[Split, Tensor]:
    return Split(split.images, torch.zeros_like(split.labels)), poisoned


@dataclass(frozen=True)
class MislabelledClean(Sound):
    """Says clean-label, and poisons every class."""

    clean_label: ClassVar[bool] = True

    def candidates(self, labels: Tensor, goal: Any) -> Tensor:
        return torch.arange(len(labels))


def _blank_trigger(victim: BackdooredModel, _: AttackContext) -> None:
    victim.trigger = Apply(lambda images: images)


BAD_ATTACKS: list[tuple[c.AttackCheck, type[Attack]]] = [
    (c.gives_a_working_model, running(lambda victim, _: victim.model.train())),
    (c.gives_a_working_model, running(lambda victim, _: _spoil(victim.model, None))),
    (c.gives_a_working_model, running(lambda victim, _: victim.notes.update(loss=torch.nan))),
    (c.gives_a_working_model, poisoning(lambda split, poisoned: (split, poisoned.flip(0)))),
    (c.same_seed_same_victim, triggering(lambda shape, _: Stamp(torch.rand(shape)))),
    (c.same_seed_same_victim, running(lambda victim, _: nn.init.normal_(victim.model[-1].weight))),  # type: ignore[index]
    (c.leaves_generators, triggering(lambda shape, _: Stamp(torch.rand(shape)))),
    (c.writes_nothing, running(lambda *_: print("done"))),
    (c.leaves_its_data, running(lambda _, ctx: ctx.train.images.zero_())),
    (c.leaves_its_data, running(lambda _, ctx: ctx.train.labels.zero_())),
    (c.trigger_keeps_range, triggering(lambda *_: Apply(lambda images: images + 1))),
    (c.trigger_keeps_range, triggering(lambda *_: Apply(lambda images: images - 1))),
    (c.trigger_keeps_range, running(lambda victim, _: _crop(victim))),
    (c.trigger_keeps_range, triggering(lambda *_: Apply(torch.rand_like))),
    (
        c.trigger_is_saved,
        triggering(lambda shape, rng: Stamp(torch.rand(shape, generator=rng), False)),
    ),
    (c.trigger_is_saved, running(_blank_trigger)),
    (c.poisons_what_it_says, _change_elsewhere("images")),
    (c.poisons_what_it_says, _change_elsewhere("labels")),
    (c.poisons_what_it_says, poisoning(lambda split, poisoned: (split, poisoned[:-1]))),
    (c.poisons_what_it_says, poisoning(_keep_labels)),
    (c.poisons_what_it_says, MislabelledClean),
]


def _crop(victim: BackdooredModel) -> None:
    victim.trigger = Apply(lambda images: images[:, :, 1:])


@pytest.mark.parametrize(("check", "broken"), BAD_ATTACKS)
def test_attack_check_catches(
    check: c.AttackCheck, broken: type[Attack], few: AttackContext
) -> None:
    with pytest.raises(AssertionError):
        check(broken, few)


def architecture(*layers: Callable[[Task], nn.Module]) -> type[Architecture]:
    @dataclass(frozen=True)
    class Broken(Architecture):
        paper: ClassVar[str] = "none"

        def build(self, task: Task) -> nn.Module:
            return nn.Sequential(*(layer(task) for layer in layers))

    return Broken


def _flat(_: Task) -> nn.Module:
    return nn.Flatten()


def _head(task: Task) -> nn.Module:
    return nn.Linear(4, task.num_classes)


def _unseeded(task: Task) -> nn.Module:
    head = nn.Linear(4, task.num_classes)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(random.getrandbits(60)))
    head.weight.data += int.from_bytes(os.urandom(2), "big")
    return head


def _apply(change: Callable[[Tensor], Tensor]) -> Callable[[Task], nn.Module]:
    return lambda _: Apply(change)


BAD_MODELS: list[tuple[c.ModelCheck, type[Architecture]]] = [
    (c.gives_logits, architecture(Normalise, _flat, lambda _: nn.Linear(4, 11))),
    (c.gives_logits, architecture(Normalise, _flat, _head, _apply(torch.log))),
    (c.normalises_first, architecture(_flat, _head)),
    (c.normalises_first, architecture(Normalise, Normalise, _flat, _head)),
    (c.same_seed_same_network, architecture(Normalise, _flat, _unseeded)),
    (
        c.treats_images_alone,
        architecture(Normalise, _apply(lambda images: images - images.mean(0)), _flat, _head),
    ),
]


@pytest.mark.parametrize(("check", "broken"), BAD_MODELS)
def test_model_check_catches(check: c.ModelCheck, broken: type[Architecture]) -> None:
    with pytest.raises(AssertionError):
        check(broken, Task((1, 2, 2), 10, (0.5,), (0.5,)))


def dataset(labels: Callable[[], list[int]], height: int = 4) -> type[Dataset]:
    """Of two classes; the test images are ``height`` pixels high."""

    @dataclass(frozen=True)
    class Broken(Dataset):
        paper: ClassVar[str] = "none"

        def load(self, ctx: LoadContext) -> Source:
            drawn = torch.tensor(labels())
            train = Split(torch.zeros(len(drawn), 1, 4, 4, dtype=torch.uint8), drawn)
            test = torch.zeros(2, 1, height, 4, dtype=torch.uint8)
            return Source(train, Split(test, torch.tensor([0, 1])), 2)

    return Broken


BAD_DATASETS: list[tuple[c.DatasetCheck, type[Dataset]]] = [
    (c.splits_are_labelled, dataset(lambda: [0, 0, 0])),
    (c.splits_are_labelled, dataset(lambda: [0, 1, 2])),
    (c.splits_are_labelled, dataset(lambda: [0, 1, -100])),
    (c.splits_are_labelled, dataset(lambda: [0, 1, 1], height=5)),
    (c.loads_the_same, dataset(lambda: [*os.urandom(8)])),
]


@pytest.mark.parametrize(("check", "broken"), BAD_DATASETS)
def test_dataset_check_catches(check: c.DatasetCheck, broken: type[Dataset]) -> None:
    with pytest.raises(AssertionError):
        check(broken, DATA)


@pytest.mark.parametrize("kind", [Defense, Attack, Architecture, Dataset])
def test_names_its_paper_catches(kind: type[Any]) -> None:
    with pytest.raises(AssertionError):
        c.names_its_paper(kind)


def test_every_check_has_a_broken_plugin() -> None:
    broken = [*BAD_DEFENSES, *BAD_ATTACKS, *BAD_MODELS, *BAD_DATASETS]
    shared = {c.settings_are_data, c.names_its_paper}
    checks = {*c.DEFENSE_CHECKS, *c.ATTACK_CHECKS, *c.MODEL_CHECKS, *c.DATASET_CHECKS}
    assert checks == shared | {check for check, _ in broken}
