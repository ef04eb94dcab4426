"""Contract: what every plug-in must keep, as named checks that raise AssertionError.

They run over all plug-ins in the suite's own tests and are meant for yours as well::

    from purebench.contract import DEFENSE_CHECKS

    for check in DEFENSE_CHECKS:
        check(MyDefense, victim, defender)

``victim`` is a BackdooredModel, ``defender`` a DefenseContext, ``attacker`` an AttackContext of a
small task, ``task`` a Task, ``context`` a LoadContext. Every check works on copies of them.
"""

from __future__ import annotations

import builtins
import copy
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from .attack import Attack, AttackContext, BackdooredModel, PoisoningAttack, triggered
from .data import Dataset, LoadContext, Split, to_float
from .defense import Defense, DefenseContext
from .errors import NotApplicable
from .evaluate import accuracy
from .model import Architecture, Normalise, Task
from .seeding import derive, isolated
from .settings import build, canonical, describe, fingerprint

DefenseCheck = Callable[[type[Defense], BackdooredModel, DefenseContext], None]
AttackCheck = Callable[[type[Attack], AttackContext], None]
ModelCheck = Callable[[type[Architecture], Task], None]
DatasetCheck = Callable[[type[Dataset], LoadContext], None]


# --- every plug-in ------------------------------------------------------------------------------


def settings_are_data(cls: type[Any], *_: Any) -> None:
    """A frozen dataclass, built without arguments, whose settings survive JSON."""
    # is_dataclass is also true of a class that only inherits from one: its fields are no settings
    assert "__dataclass_fields__" in vars(cls), f"{cls.__name__} must be a dataclass"
    assert cls.__dataclass_params__.frozen, f"{cls.__name__} must be frozen"
    try:
        plugin = cls()
        settings = json.loads(canonical(describe(plugin)))
        again = build(cls, settings, cls.__name__)
    except (TypeError, ValueError, LookupError) as error:
        raise AssertionError(f"{cls.__name__}: {type(error).__name__}: {error}") from error
    assert again == plugin, f"{cls.__name__} is not rebuilt from {settings}"
    assert fingerprint(describe(again)) == fingerprint(describe(plugin))


# --- defenses -----------------------------------------------------------------------------------


def names_its_paper(cls: type[Any], *_: Any) -> None:
    """``paper`` says whose method it is."""
    assert cls.paper.strip(), f"{cls.__name__} must set paper"


def gives_finite_logits(cls: type[Defense], victim: BackdooredModel, ctx: DefenseContext) -> None:
    """A network of the same shape of output, on the same device, with finite logits."""
    purified, _ = purify(cls, victim, ctx)
    assert isinstance(purified, nn.Module), f"purify returned {type(purified).__name__}"
    places = {str(tensor.device) for tensor in purified.state_dict().values()}
    assert places == {str(ctx.benign.images.device)}, f"the network lies on {places}"
    images = to_float(ctx.benign.images[:8])
    with torch.no_grad():
        logits = purified.eval()(images)
    assert logits.shape == (len(images), ctx.num_classes), f"logits are {tuple(logits.shape)}"
    assert logits.isfinite().all(), "logits are not finite"


def keeps_clean_accuracy(cls: type[Defense], victim: BackdooredModel, ctx: DefenseContext) -> None:
    """A network that does not know the benign images any more has not been purified."""
    before = accuracy(victim.model, ctx.benign)
    after = accuracy(purify(cls, victim, ctx)[0], ctx.benign)
    assert after >= before - 0.15, f"accuracy on benign images fell from {before} to {after}"


def same_seed_same_weights(
    cls: type[Defense], victim: BackdooredModel, ctx: DefenseContext
) -> None:
    """All chance comes from ``ctx.seed``: the global generators' state plays no part."""
    first, second = (purify(cls, victim, ctx, global_seed=seed)[0].state_dict() for seed in (1, 2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between two equal runs"


def leaves_no_hooks(cls: type[Defense], victim: BackdooredModel, ctx: DefenseContext) -> None:
    """No hook of any kind stays on the network."""
    for name, module in purify(cls, victim, ctx)[0].named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            assert not getattr(module, kind), f"a hook stays on {name or 'the network'}"
        assert not getattr(module, "_backward_pre_hooks", None), f"a hook stays on {name}"


def leaves_generators(cls: type[Defense], victim: BackdooredModel, ctx: DefenseContext) -> None:
    """The global generators are as before when it is done."""
    with _generators_unmoved():
        purify(cls, victim, ctx, seeded=False)


def leaves_weights_trainable(
    cls: type[Defense], victim: BackdooredModel, ctx: DefenseContext
) -> None:
    """No weight stays frozen, and gradients are on."""
    frozen = {name for name, weight in victim.model.named_parameters() if not weight.requires_grad}
    purified, _ = purify(cls, victim, ctx)
    assert torch.is_grad_enabled(), "gradients are switched off"
    for name, weight in purified.named_parameters():
        assert weight.requires_grad or name in frozen, f"{name} stays frozen"


def leaves_benign_data(cls: type[Defense], victim: BackdooredModel, ctx: DefenseContext) -> None:
    """The benign images are shared by all defenses."""
    before = ctx.benign.digest()
    purify(cls, victim, ctx)
    assert ctx.benign.digest() == before, "the benign images were changed"


def writes_nothing(cls: type[Defense], victim: BackdooredModel, ctx: DefenseContext) -> None:
    """Facts go to ``ctx.notes``, progress to ``ctx.progress``; no file is written."""
    with _silent():
        purify(cls, victim, ctx)


def notes_are_data(cls: type[Defense], victim: BackdooredModel, ctx: DefenseContext) -> None:
    """``ctx.notes`` survives JSON."""
    _survives_json(purify(cls, victim, ctx)[1].notes)


DEFENSE_CHECKS: tuple[DefenseCheck, ...] = (
    settings_are_data,
    names_its_paper,
    gives_finite_logits,
    keeps_clean_accuracy,
    same_seed_same_weights,
    leaves_no_hooks,
    leaves_generators,
    leaves_weights_trainable,
    leaves_benign_data,
    writes_nothing,
    notes_are_data,
)


def purify(
    cls: type[Defense],
    victim: BackdooredModel,
    ctx: DefenseContext,
    *,
    global_seed: int = 0,
    seeded: bool = True,
) -> tuple[nn.Module, DefenseContext]:
    """Run a defense as the runner does, on private copies; NotApplicable passes through."""
    private = replace(ctx, notes={})
    model = copy.deepcopy(victim.model).eval()
    if not seeded:
        return cls().purify(model, private), private
    with isolated(global_seed):
        return cls().purify(model, private), private


# --- attacks ------------------------------------------------------------------------------------


def gives_a_working_model(cls: type[Attack], ctx: AttackContext) -> None:
    """``run`` gives a network in evaluation mode with finite logits, and sorted indices."""
    victim = _attack(cls, ctx)
    assert not any(module.training for module in victim.model.modules()), "not in evaluation mode"
    with torch.no_grad():
        logits = victim.model(to_float(ctx.train.images[:8]))
    assert logits.shape == (8, ctx.task.num_classes), f"logits are {tuple(logits.shape)}"
    assert logits.isfinite().all(), "logits are not finite"
    assert torch.equal(victim.poisoned, victim.poisoned.unique()), "indices are not sorted"
    _survives_json(victim.notes)


def same_seed_same_victim(cls: type[Attack], ctx: AttackContext) -> None:
    """All chance comes from ``ctx.seed``."""
    first, second = (_attack(cls, ctx, global_seed=seed) for seed in (1, 2))
    assert torch.equal(first.poisoned, second.poisoned), "the poisoned images differ"
    for part in ("model", "trigger"):
        again = getattr(second, part).state_dict()
        for name, value in getattr(first, part).state_dict().items():
            assert torch.equal(value, again[name]), f"{part}.{name} differs between equal runs"


def attack_leaves_generators(cls: type[Attack], ctx: AttackContext) -> None:
    """The global generators are as before when it is done."""
    with _generators_unmoved():
        _attack(cls, ctx, seeded=False)


def attack_writes_nothing(cls: type[Attack], ctx: AttackContext) -> None:
    """Facts go to ``ctx.notes``, progress to ``ctx.progress``; no file is written."""
    with _silent():
        _attack(cls, ctx)


def leaves_training_data(cls: type[Attack], ctx: AttackContext) -> None:
    """The clean training split is shared by all attacks."""
    before = ctx.train.digest()
    _attack(cls, ctx)
    assert ctx.train.digest() == before, "the clean training split was changed"


def trigger_keeps_range(cls: type[Attack], ctx: AttackContext) -> None:
    """Triggered images have the shape and range of images, and the trigger is stateless."""
    images = ctx.train.images[:8]
    trigger = _attack(cls, ctx).trigger
    with torch.no_grad():
        marked = trigger(to_float(images))
    assert marked.shape == images.shape, f"the trigger gives {tuple(marked.shape)}"
    slack = 1e-4
    assert marked.min() >= -slack, "triggered pixels lie below 0"
    assert marked.max() <= 1 + slack, "triggered pixels lie above 1"
    once, twice = triggered(trigger, images), triggered(trigger, images)
    assert torch.equal(once, twice), "the trigger gives another image each time"


def trigger_is_saved(cls: type[Attack], ctx: AttackContext) -> None:
    """``make_trigger`` and the trigger's tensors give the same trigger back."""
    trigger = _attack(cls, ctx).trigger
    blank = cls().make_trigger(ctx.train.shape, torch.Generator().manual_seed(99))
    try:
        blank.load_state_dict(trigger.state_dict())
    except RuntimeError as error:
        raise AssertionError(f"make_trigger gives another trigger than run: {error}") from error
    images = ctx.train.images[:8]
    assert torch.equal(triggered(blank.eval(), images), triggered(trigger, images))


def poisons_what_it_says(cls: type[Attack], ctx: AttackContext) -> None:
    """Outside the poisoned indices every pixel and label is as it was; inside, labels are the
    attacker's (under clean-label: untouched, and of the target class)."""
    attack = cls()
    if not isinstance(attack, PoisoningAttack):
        return
    split, poisoned, _ = attack.poison(replace(ctx, notes={}))
    clean = ctx.train
    assert len(poisoned) == attack.poison_count(clean.labels, ctx.goal, ctx.poison_rate)
    kept = torch.ones(len(clean), dtype=torch.bool)
    kept[poisoned] = False
    assert torch.equal(split.images[kept], clean.images[kept]), "pixels changed elsewhere"
    assert torch.equal(split.labels[kept], clean.labels[kept]), "labels changed elsewhere"
    wanted = clean.labels if attack.clean_label else ctx.goal.labels(clean.labels)
    assert torch.equal(split.labels[poisoned], wanted[poisoned]), "labels are not the attacker's"
    if attack.clean_label:
        assert (clean.labels[poisoned] == ctx.goal.target).all(), "poisoned another class"


ATTACK_CHECKS: tuple[AttackCheck, ...] = (
    settings_are_data,
    names_its_paper,
    gives_a_working_model,
    same_seed_same_victim,
    attack_leaves_generators,
    attack_writes_nothing,
    leaves_training_data,
    trigger_keeps_range,
    trigger_is_saved,
    poisons_what_it_says,
)


def _attack(
    cls: type[Attack], ctx: AttackContext, *, global_seed: int = 0, seeded: bool = True
) -> BackdooredModel:
    private = replace(ctx, notes={})
    if not seeded:
        return cls().run(private)
    with isolated(global_seed):
        return cls().run(private)


# --- models -------------------------------------------------------------------------------------


def gives_logits(cls: type[Architecture], task: Task) -> None:
    """Finite logits, one per class, in training and in evaluation."""
    model = _network(cls, task)
    images = torch.rand(4, *task.shape, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        logits = model.train(mode)(images)
        assert logits.shape == (4, task.num_classes), f"logits are {tuple(logits.shape)}"
        assert logits.isfinite().all(), "logits are not finite"


def normalises_first(cls: type[Architecture], task: Task) -> None:
    """Images in [0, 1] go in: the first layer normalises, and there is one."""
    kinds = [
        type(module) for module in _network(cls, task).modules() if not list(module.children())
    ]
    assert kinds[0] is Normalise, f"the first layer is {kinds[0].__name__}"
    assert kinds.count(Normalise) == 1, "more than one layer normalises"


def same_seed_same_network(cls: type[Architecture], task: Task) -> None:
    """Initial weights come from torch's global generator alone."""
    first, second = (_network(cls, task).state_dict() for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between equal builds"


def treats_images_alone(cls: type[Architecture], task: Task) -> None:
    """In evaluation an image's logits do not depend on its neighbours."""
    model = _network(cls, task).eval()
    images = torch.rand(4, *task.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-4), "logits depend on the batch"


MODEL_CHECKS: tuple[ModelCheck, ...] = (
    settings_are_data,
    names_its_paper,
    gives_logits,
    normalises_first,
    same_seed_same_network,
    treats_images_alone,
)


def _network(cls: type[Architecture], task: Task) -> nn.Module:
    with isolated(0):
        return cls().build(task)


# --- datasets -----------------------------------------------------------------------------------


def splits_are_labelled(cls: type[Dataset], ctx: LoadContext) -> None:
    """Both splits hold every class 0..K-1 and no other label, and images of one shape."""
    train, test, classes = cls().load(ctx)
    assert train.shape == test.shape, f"{tuple(train.shape)} and {tuple(test.shape)}"
    for split in (train, test):
        assert split.labels.unique().tolist() == list(range(classes)), "labels are not 0..K-1"


def loads_the_same(cls: type[Dataset], ctx: LoadContext) -> None:
    """Twice the same bytes."""
    first, second = (cls().load(ctx).digest() for _ in range(2))
    assert first == second, "two loads differ"


DATASET_CHECKS: tuple[DatasetCheck, ...] = (
    settings_are_data,
    names_its_paper,
    splits_are_labelled,
    loads_the_same,
)


# --- means --------------------------------------------------------------------------------------


def _survives_json(notes: Any) -> None:
    try:
        canonical(notes)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"notes are not JSON: {error}") from error


@contextmanager
def _generators_unmoved() -> Iterator[None]:
    def state() -> list[Any]:
        numpy_state: Any = np.random.get_state()
        return [random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()]

    with isolated(derive(0, "contract")):
        before = state()
        yield
        after = state()
    for name, old, new in zip(("random", "numpy", "torch"), before, after, strict=True):
        assert old == new, f"the global generator of {name} was moved"


@contextmanager
def _silent() -> Iterator[None]:
    real_open, real_os_open = builtins.open, os.open

    def guarded(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        assert not set(mode) & set("wax+"), f"{file} was opened for writing"
        return real_open(file, mode, *rest, **more)

    def guarded_os(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        assert not flags & (os.O_WRONLY | os.O_RDWR), f"{path} was opened for writing"
        return real_os_open(path, flags, *rest, **more)

    out = io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(out),
        mock.patch.object(builtins, "open", guarded),
        mock.patch.object(io, "open", guarded),
        mock.patch.object(os, "open", guarded_os),
    ):
        yield
    assert not out.getvalue(), f"it printed {out.getvalue()[:80]!r}"


__all__ = [
    "ATTACK_CHECKS",
    "DATASET_CHECKS",
    "DEFENSE_CHECKS",
    "MODEL_CHECKS",
    "NotApplicable",
    "Split",
    "Tensor",
    "purify",
]
