"""What a defender holds, and what the simple defenses do, on a network that can be followed by eye.

robust_recovery has tests of its own.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from purebench import (
    DEFENSES,
    MODELS,
    BackdooredModel,
    DataBundle,
    DefenseContext,
    NotApplicable,
    Recipe,
    Split,
    Task,
)
from purebench.data import to_float
from purebench.evaluate import Judge, accuracy
from purebench.layers import hooked, layer_outputs
from purebench.seeding import isolated

channels_module: Any = import_module("purebench.defenses._channels")
activity, last_channels = channels_module.activity, channels_module.last_channels
prune_inactive = channels_module.prune_inactive

# --- the context --------------------------------------------------------------------------------


def test_context_hides_the_answer() -> None:
    """A defender holding the trigger, the target or the test split would mark its own exam."""
    assert {field.name for field in dataclasses.fields(DefenseContext)} == {
        "benign", "num_classes", "recipe", "device", "seed", "notes", "timings", "progress",
        "suspect", "initial", "oracle", "verdict",
    }  # fmt: skip


def benign(sizes: list[int]) -> Split:
    """Images of 1x2 pixels that hold their own number."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    numbers = torch.arange(len(labels))
    pixels = torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8)
    return Split(pixels.view(-1, 1, 1, 2), labels)


def context(split: Split, seed: int = 0) -> DefenseContext:
    classes = int(split.labels.max()) + 1
    return DefenseContext(split, classes, Recipe(), torch.device("cpu"), seed)


def numbers(split: Split) -> list[int]:
    return [256 * high + low for high, low in split.images.flatten(1).tolist()]


@pytest.mark.parametrize(
    ("sizes", "fraction", "shares"),
    [([50, 50], 0.2, [10, 10]), ([600, 30, 10], 0.1, [60, 3, 1]), ([2, 2], 0.01, [1, 0])],
)
def test_holdout(sizes: list[int], fraction: float, shares: list[int]) -> None:
    split = benign(sizes)
    rest, held = context(split).holdout(fraction)
    assert sorted(numbers(rest) + numbers(held)) == numbers(split)
    assert torch.bincount(held.labels, minlength=len(sizes)).tolist() == shares
    for part in (rest, held):
        assert torch.equal(part.labels, split.labels[torch.tensor(numbers(part))])


def test_holdout_follows_from_the_seed() -> None:
    first, again, other = (
        numbers(context(benign([50, 50]), seed).holdout(0.2)[1]) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_holdout_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        context(benign([5, 5])).holdout(fraction)


# --- pruning ------------------------------------------------------------------------------------

DARK, BRIGHT = 51, 153  # 0.2 and 0.6: class 0 and class 1


def followed(norm: bool) -> nn.Sequential:
    """On one pixel x: channels relu(x), relu(x - 0.9), relu(x - 0.4) and 1, of which the third
    alone tells bright from dark and the second, idle below 0.9, opens a back door to class 0.
    """
    conv = nn.Conv2d(1, 4, 1)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(4)] if norm else [conv]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).eval()
    weights = {
        "weight": torch.tensor([1.0, 1, 1, 0]).view(4, 1, 1, 1),
        "bias": torch.tensor([0.0, -0.9, -0.4, 1]),
    }
    conv.load_state_dict(weights)
    head: Any = model[-1]
    head.load_state_dict(
        {
            "weight": torch.tensor([[0.0, 100, 0, 0], [0, 0, 10, 0]]),
            "bias": torch.tensor([0.0, -1]),
        }
    )
    return model


def pixels(*values: int) -> Split:
    """One image a value, labelled by its brightness."""
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Split(images, (images.flatten() > 100).long())


def alive(model: nn.Module) -> list[int]:
    """The last convolution's channels that any pixel, negative ones included, moves."""
    channels = last_channels(model, pixels(0).images)
    seen: list[Tensor] = []
    hook = (channels.norm or channels.conv).register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    with torch.no_grad():
        model(torch.linspace(-5, 5, 101).view(-1, 1, 1, 1))
    hook.remove()
    return torch.nonzero(seen[0].flatten(1).any(0)).flatten().tolist()


BOTH = pixels(*[DARK, BRIGHT] * 10)


@pytest.mark.parametrize("norm", [False, True])
def test_activity_by_hand(norm: bool) -> None:
    model = followed(norm)
    channels = last_channels(model, BOTH.images)
    assert (channels.norm is not None) is norm
    found = activity(model, channels, BOTH.images)
    assert found.tolist() == pytest.approx([0.4, 0, 0.1, 1], abs=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("budget", "pruned"),
    [
        (0.0, [1]),  # the idle one; the next costs half the accuracy
        (0.49, [1]),
        (0.51, [0, 1, 2]),  # one is left alive
    ],
)
def test_prune_silences_what_is_idle(norm: bool, budget: float, pruned: list[int]) -> None:
    model = followed(norm)
    notes = prune_inactive(model, BOTH, BOTH, budget, steps=64)
    assert notes["pruned"] == pruned
    assert alive(model) == [channel for channel in range(4) if channel not in pruned]
    assert notes["validation_accuracy"] == accuracy(model, BOTH) == (0.5 if 2 in pruned else 1.0)


def test_prune_closes_the_back_door() -> None:
    door = Split(pixels(255).images, torch.tensor([1]))
    model = followed(norm=True)
    assert accuracy(model, door) == 0
    prune_inactive(model, BOTH, BOTH, 0.02, steps=64)
    assert accuracy(model, door) == 1


@pytest.mark.parametrize(
    ("fit", "validation", "pruned"),
    [
        (pixels(DARK), BOTH, [1]),  # channels 1 and 2 idle alike; validation saves the second
        (BOTH, pixels(DARK), [0, 1, 2]),  # validation misses nothing
    ],
)
def test_prune_stops_on_the_validation_part(
    fit: Split, validation: Split, pruned: list[int]
) -> None:
    assert prune_inactive(followed(True), fit, validation, 0.02, steps=64)["pruned"] == pruned


def test_prune_leaves_everything_else_as_it_was() -> None:
    model = followed(norm=True)
    before = copy.deepcopy(model.state_dict())
    prune_inactive(model, BOTH, BOTH, 0.02, steps=64)
    for name, value in model.state_dict().items():
        changed = torch.nonzero((value != before[name]).flatten()).flatten().tolist()
        silenced = name in ("0.weight", "0.bias", "1.weight")  # norm's bias was zero already
        assert changed == ([1] if silenced else []), name


def test_prune_takes_its_steps() -> None:
    """Two steps: channels 1 and 2 together, which costs too much."""
    assert prune_inactive(followed(True), BOTH, BOTH, 0.02, steps=2)["pruned"] == []


@pytest.mark.parametrize("name", ["prune", "fine_prune"])
def test_pruning_needs_a_convolution(name: str, defender: DefenseContext) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
    with pytest.raises(NotApplicable, match="no convolution"):
        DEFENSES[name]().purify(model, defender)


@pytest.mark.parametrize(("name", "settings"), [("prune", {}), ("fine_prune", {"epochs": 5})])
def test_pruned_channels_stay_silent(
    name: str,
    settings: dict[str, Any],
    victim: BackdooredModel,
    defender: DefenseContext,
    bundle: DataBundle,
) -> None:
    ctx = replace(defender, notes={})
    model = DEFENSES[name](**settings).purify(copy.deepcopy(victim.model), ctx)
    pruned = ctx.notes["pruned"]
    assert 0 < len(pruned) < 80
    channels = last_channels(model, bundle.test.images)
    seen = layer_outputs(model, channels.norm or channels.conv, bundle.test.images)
    assert not torch.cat(list(seen))[:, pruned].any()


def test_fine_tuning_revives_no_pruned_channel() -> None:
    """Behind a leaky ReLU a silent channel has gradients, and would grow back."""
    model, ctx = followed(norm=True), context(BOTH)
    model[2] = nn.LeakyReLU()
    DEFENSES["fine_prune"]().purify(model, ctx)
    assert ctx.notes["pruned"] == [1]
    assert alive(model) == [0, 2, 3]


def residual(task: Task) -> Any:
    narrow: Any = MODELS["preact_resnet18"]
    return narrow(width=2).build(task).eval()


def test_channels_before_a_sum_are_those_of_the_sum(task: Task, bundle: DataBundle) -> None:
    """Where the last convolution's outputs are added to a shortcut's the head takes the sums."""
    model, images = residual(task), bundle.test.images[:50]
    channels = last_channels(model, images)
    assert channels.name == "stage4.1.conv2"
    assert channels.head is model.head
    sums = torch.cat(list(layer_outputs(model, model.stage4, images)))
    assert torch.allclose(activity(model, channels, images), sums.double().mean((0, 2, 3)))
    idle = torch.tensor([0, 5])
    channels.silence(idle)
    with torch.no_grad():
        told = model(to_float(images))
        with hooked([model.stage4], lambda _, __, sums: sums.index_fill(1, idle, 0)):
            assert torch.equal(model(to_float(images)), told)
        with hooked([model.stage4], lambda _, __, sums: sums.index_fill(1, idle + 1, 0)):
            assert not torch.equal(model(to_float(images)), told)


def test_fine_tuning_revives_no_pruned_sum(task: Task, defender: DefenseContext) -> None:
    ctx, model = replace(defender, notes={}), residual(task)
    before = copy.deepcopy(model.state_dict())
    defense: Any = DEFENSES["fine_prune"]
    after = defense(epochs=1, budget=0.05).purify(model, ctx).state_dict()
    pruned = torch.tensor(ctx.notes["pruned"])
    assert 0 < len(pruned) < 16
    assert not after["head.weight"][:, pruned].any()
    rest = torch.ones(16, dtype=torch.bool).index_fill(0, pruned, False)
    assert (after["head.weight"] != before["head.weight"])[:, rest].all()


def test_prune_removes_the_back_door_within_its_budget(
    victim: BackdooredModel, defender: DefenseContext, bundle: DataBundle
) -> None:
    ctx = replace(defender, notes={})
    model = DEFENSES["prune"]().purify(copy.deepcopy(victim.model), ctx)
    _, validation = ctx.holdout(0.2)
    assert accuracy(model, validation) >= accuracy(victim.model, validation) - 0.02
    assert accuracy(model, validation) == pytest.approx(ctx.notes["validation_accuracy"], abs=1e-6)
    assert Judge(bundle.test, victim.trigger, victim.goal).score(model).asr < 0.5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prune", {"budget": -0.1}), ("prune", {"budget": 1.0}), ("prune", {"holdout": 0.0}),
        ("prune", {"holdout": 1.0}), ("prune", {"steps": 1}), ("fine_prune", {"budget": 1.0}),
        ("fine_prune", {"epochs": 0}), ("fine_tune", {"lr": -1.0}), ("fine_tune", {"epochs": 0}),
        ("fine_tune", {"batch_size": 0}),
    ],
)  # fmt: skip
def test_settings_out_of_range(name: str, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DEFENSES[name](**settings)


# --- the others ---------------------------------------------------------------------------------


def test_none_returns_the_same_weights(victim: BackdooredModel, defender: DefenseContext) -> None:
    model = DEFENSES["none"]().purify(copy.deepcopy(victim.model), defender)
    before = victim.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fine_tune_moves_the_weights(victim: BackdooredModel, defender: DefenseContext) -> None:
    ctx = replace(defender, notes={})
    fine_tune: Any = DEFENSES["fine_tune"]
    model = fine_tune(epochs=3).purify(copy.deepcopy(victim.model), ctx)
    before = dict(victim.model.named_parameters())
    assert not any(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert len(ctx.notes["loss_by_epoch"]) == 3
    assert accuracy(model, ctx.benign) >= 0.95


def test_fine_tune_learns_from_benign_labels(task: Task, defender: DefenseContext) -> None:
    """A fresh network, which knows nothing, and labels that are each one too high."""
    with isolated(0):
        model = MODELS["small_cnn"]().build(task)
    moved = Split(defender.benign.images, (defender.benign.labels + 1) % 4)
    fine_tune: Any = DEFENSES["fine_tune"]
    fine_tune(lr=0.05, epochs=20).purify(model, replace(defender, benign=moved, notes={}))
    assert accuracy(model, moved) > 0.95
