"""Attacks that train networks of their own, held against definitions computed image by image."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from purebench import ATTACKS, AttackContext, Goal, Recipe, Split, UsageError, fit
from purebench.adversarial import pgd
from purebench.attack import triggered
from purebench.data import to_float
from purebench.errors import Diverged

control: Any = import_module("purebench.attacks._control")
clean_label: Any = import_module("purebench.attacks.clean_label")
input_aware: Any = import_module("purebench.attacks.input_aware")
generators: Any = import_module("purebench.attacks._generators")

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 28, 30)]

# what the corners of a black, of a white and of a grey image show at amplitude 255
RIGHT = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
LEFT = [[255, 0, 0], [0, 255, 0], [255, 0, 255]]


@pytest.fixture
def few(attacker: AttackContext) -> AttackContext:
    """The attacker with 300 images and one epoch."""
    images, labels = attacker.train.images[:300], attacker.train.labels[:300]
    recipe = replace(attacker.recipe, epochs=1)
    return replace(attacker, train=Split(images.clone(), labels.clone()), recipe=recipe)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """Two logits: plus and minus the weighted sum of pixels."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images: Tensor) -> Tensor:
        score = (images * self.weights).flatten(1).sum(1)
        return torch.stack([score, -score], 1)


# --- PGD ----------------------------------------------------------------------------------------


def test_pgd_linf_on_a_linear_network() -> None:
    """To lower the sum, each pixel goes eps against its weight's sign, within [0, 1]."""
    weights = torch.tensor([[[1.0, -2.0], [3.0, -4.0]]])
    images = torch.tensor([[[[0.5, 0.5], [0.05, 0.95]]]])
    hard = pgd(Linear(weights), images, torch.tensor([0]), eps=0.1, step=0.03, steps=5)
    torch.testing.assert_close(hard, torch.tensor([[[[0.4, 0.6], [0.0, 1.0]]]]))
    short = pgd(Linear(weights), images, torch.tensor([0]), eps=0.1, step=0.03, steps=2)
    torch.testing.assert_close(short, torch.tensor([[[[0.44, 0.56], [0.0, 1.0]]]]))


def test_pgd_l2_on_a_linear_network() -> None:
    """Along the weights' direction, 3 : 4, until the radius."""
    weights = torch.tensor([[[3.0, -4.0]]])
    images = torch.full((2, 1, 1, 2), 0.5)
    labels = torch.tensor([0, 1])
    hard = pgd(Linear(weights), images, labels, eps=0.1, step=0.04, steps=9, norm="l2")
    torch.testing.assert_close(hard[0].flatten(), torch.tensor([0.44, 0.58]))
    torch.testing.assert_close(hard[1].flatten(), torch.tensor([0.56, 0.42]))
    short = pgd(Linear(weights), images, labels, eps=0.1, step=0.04, steps=1, norm="l2")
    torch.testing.assert_close(short[0].flatten(), torch.tensor([0.476, 0.532]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 3])
def test_pgd_stays_in_the_ball(norm: Any, steps: int) -> None:
    images = noise(5, 3, 6, 6).round(decimals=1)  # some lie at 0 and at 1
    model = Linear(noise(3, 6, 6, seed=1) - 0.5)
    labels = torch.tensor([0, 1, 0, 1, 0])
    hard = [
        pgd(
            model,
            images,
            labels,
            eps=0.2,
            step=0.1,
            steps=steps,
            norm=norm,
            rng=torch.Generator().manual_seed(4),
        )
        for _ in range(2)
    ]
    assert torch.equal(*hard)
    change = (hard[0] - images).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= 0.2 + 1e-6
    assert size.min() > 0.05
    assert hard[0].min() >= 0
    assert hard[0].max() <= 1
    assert not hard[0].requires_grad
    assert model.weights.grad is None


def test_pgd_without_gradients_around_it() -> None:
    with torch.no_grad():
        hard = pgd(Linear(torch.ones(1, 1, 1)), torch.ones(1, 1, 1, 1), torch.tensor([0]),
                   eps=0.5, step=0.5, steps=1)  # fmt: skip
    assert hard.item() == pytest.approx(0.5)


# --- clean label --------------------------------------------------------------------------------


@pytest.mark.parametrize("amplitude", [32, 64, 255])
@pytest.mark.parametrize("shape", SHAPES)
def test_corners(shape: tuple[int, int, int], amplitude: int) -> None:
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(256, (9, *shape), generator=rng, dtype=torch.uint8)
    trigger = clean_label.CleanLabel(amplitude=amplitude).make_trigger(torch.Size(shape), rng)
    marked = triggered(trigger, images)
    for image, given in zip(marked.numpy(), images.numpy(), strict=True):
        expected = given.astype(int)
        for channel in expected:
            for rows in (0, shape[1] - 3):
                for columns, pattern in ((0, LEFT), (shape[2] - 3, RIGHT)):
                    for row in range(3):
                        for column in range(3):
                            sign = 1 if pattern[row][column] else -1
                            channel[rows + row, columns + column] += sign * amplitude
        assert np.array_equal(image, expected.clip(0, 255))
    if amplitude == 255:
        assert marked[:, :, :3, -3:].eq(torch.tensor(RIGHT)).all()
        assert marked[:, :, -3:, :3].eq(torch.tensor(LEFT)).all()


def test_clean_label_plants_hard_images_and_corners(
    few: AttackContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of L-inf on a linear network: +-eps by the sign of its weights, then the corners."""
    shape = few.train.shape
    weights = noise(*shape, seed=3) - 0.5
    few = replace(few, goal=Goal(few.goal.num_classes, target=0), poison_rate=0.5)
    monkeypatch.setattr(clean_label, "_CHUNK", 7)
    attack = clean_label.CleanLabel(norm="linf", eps=20, step=1, steps=1)
    monkeypatch.setattr(clean_label.CleanLabel, "train_surrogate", lambda *_: Linear(weights))
    split, poisoned, trigger = attack.poison(few)
    assert torch.equal(split.labels, few.train.labels)
    assert few.train.labels[poisoned].eq(0).all()
    before = few.train.images[poisoned].numpy().astype(int)
    moved = (before - 20 * np.sign(weights.numpy()).astype(int)).clip(0, 255).astype(np.uint8)
    expected = triggered(trigger, torch.from_numpy(moved))
    assert torch.equal(split.images[poisoned], expected)


def test_the_surrogate_is_robust_when_asked(attacker: AttackContext) -> None:
    """Trained against the perturbation, it withstands it better than a natural one."""
    images, labels = to_float(attacker.train.images[:256]), attacker.train.labels[:256]
    right = {}
    for kind in ("natural", "adversarial"):
        attack = clean_label.CleanLabel(surrogate=kind, eps=400, surrogate_share=1.0)
        model = attack.train_surrogate(attacker)
        assert not model.training
        hard = pgd(model, images, labels, eps=0.8, step=0.2, steps=8, norm="l2")
        right[kind] = model(hard).argmax(1).eq(labels).float().mean().item()
    assert right["adversarial"] > right["natural"] + 0.1


def test_the_surrogate_does_not_start_from_the_victims_weights(few: AttackContext) -> None:
    frozen = replace(few, recipe=Recipe(epochs=1, lr=0.0, weight_decay=0.0))
    surrogate = clean_label.CleanLabel(surrogate="natural").train_surrogate(frozen)
    again = clean_label.CleanLabel(surrogate="natural").train_surrogate(frozen)
    for name, weight in few.build().named_parameters():
        assert torch.equal(surrogate.get_parameter(name), again.get_parameter(name))
        if name.startswith("conv"):
            assert not torch.equal(surrogate.get_parameter(name), weight)


# --- input-aware --------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_generators_keep_the_size(shape: tuple[int, int, int], levels: int) -> None:
    network = generators.EncoderDecoder(shape[0], 2, width=3, levels=levels)
    assert network(noise(4, *shape)).shape == (4, 2, *shape[1:])


def test_planted() -> None:
    """x + (g - x) m, pixel by pixel; one mask for all channels."""
    images, patterns, masks = (
        noise(2, 3, 4, 4),
        noise(2, 3, 4, 4, seed=1),
        noise(2, 1, 4, 4, seed=2),
    )
    marked = input_aware.planted(images, patterns, masks)
    for n, c, i, j in np.ndindex(2, 3, 4, 4):
        x, g, m = images[n, c, i, j], patterns[n, c, i, j], masks[n, 0, i, j]
        assert marked[n, c, i, j].item() == pytest.approx(float((1 - m) * x + m * g), abs=1e-6)


def test_the_mask_is_sharpened() -> None:
    """tanh(20 v - 10) / 2 + 1/2 of v = tanh(y) / 2 + 1/2."""
    trigger = input_aware.InputAwareTrigger(1, 1, 1)
    logits = torch.tensor([-1.0, 0.0, 0.1, 2.0]).view(1, 1, 2, 2)
    trigger.masker = nn.Identity()
    value = np.tanh(logits.numpy()) / 2 + 0.5
    expected = np.tanh(20 * value - 10) / 2 + 0.5
    np.testing.assert_allclose(trigger.masks(logits).numpy(), expected, atol=1e-6)


def test_sameness() -> None:
    """Two images .6 apart whose outputs are .2 apart: 3, whichever comes first."""
    images, outputs = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    images[1], outputs[1] = 0.6, 0.2
    assert input_aware.sameness(images, outputs).item() == pytest.approx(3, rel=1e-3)
    alone = outputs[:1].clone().requires_grad_()
    input_aware.sameness(images[:1], alone).backward()
    assert alone.grad is not None
    assert alone.grad.isfinite().all()


@pytest.mark.parametrize(("poisoned", "others", "count"), [(60, 540, 5), (3, 97, 10), (1, 1, 1)])
def test_mixed_spreads_both_sets_evenly(poisoned: int, others: int, count: int) -> None:
    sets = torch.arange(poisoned), torch.arange(poisoned, poisoned + others)
    parts = list(control.mixed(*sets, count, torch.Generator().manual_seed(0)))
    assert len(parts) == count
    for part, members in enumerate(sets):
        seen = [pair[part] for pair in parts]
        assert torch.equal(torch.cat(seen).sort().values, members)
        sizes = [len(indices) for indices in seen]
        assert max(sizes) - min(sizes) <= 1
    if poisoned == 3:  # of ten batches: not the first three
        assert [len(first) for first, _ in parts].index(1) == 3


def test_a_batch_holds_poisoned_cross_and_clean_images() -> None:
    trigger = input_aware.InputAwareTrigger(1, 2, 1).eval()
    images = noise(10, 1, 8, 8)
    fed, _ = input_aware.InputAware(cross=1.5)._plant(images, 2, trigger)
    own, masks = trigger.patterns(images[:2]), trigger.masks(images[:2])
    expected = images.clone()
    for place, giver in ((0, 0), (1, 1), (2, 0), (3, 1), (4, 0)):
        expected[place] += (own[giver] - images[place]) * masks[giver]
    torch.testing.assert_close(fed, expected)
    untouched, loss = input_aware.InputAware()._plant(images, 0, trigger)
    assert torch.equal(untouched, images)
    assert loss == 0


def test_cross_accuracy_uses_the_neighbours_trigger() -> None:
    """The mask is everything and the pattern is the image: each image becomes its neighbour."""
    trigger = input_aware.InputAwareTrigger(1, 1, 1)
    trigger.patterns = lambda images: images
    trigger.masks = torch.ones_like
    images = torch.tensor([0, 0, 255, 0], dtype=torch.uint8).view(4, 1, 1, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model.load_state_dict(
        {"1.weight": torch.tensor([[-1.0], [1.0]]), "1.bias": torch.tensor([1.0, 0])}
    )
    judged = Split(images, torch.tensor([0, 0, 1, 0]))
    assert input_aware.cross_accuracy(model, trigger, judged) == 0.5


def test_both_optimisers_see_the_gradients_of_one_step_alone() -> None:
    first, second = (nn.Parameter(torch.tensor(0.0)) for _ in range(2))
    rates = {torch.optim.SGD([first]): 0.5, torch.optim.SGD([second]): 0.25}
    for _ in range(3):
        control.descend(first + second, rates)
    assert (first.item(), second.item()) == (-1.5, -0.75)


def test_low_rates_train(few: AttackContext) -> None:
    """One poisoned image in a batch, and batches without any."""
    victim = input_aware.InputAware(width=2).run(replace(few, poison_rate=2 / 300))
    assert len(victim.poisoned) == 2
    assert 0 <= victim.notes["cross_accuracy"] <= 1
    assert all(weight.isfinite().all() for weight in victim.trigger.state_dict().values())


def test_all_to_all_trains(few: AttackContext) -> None:
    goal = Goal(few.goal.num_classes, all_to_all=True)
    assert input_aware.InputAware(width=2).run(replace(few, goal=goal)).goal == goal


def test_cross_images_must_be_there() -> None:
    attack = input_aware.InputAware()
    attack.check(torch.arange(100) % 5, Goal(5), 0.5)
    with pytest.raises(UsageError, match=r"poison rate 0\.6 .* takes rates to 0\.5"):
        attack.check(torch.arange(100) % 5, Goal(5), 0.6)


def test_divergence_is_told(few: AttackContext) -> None:
    with pytest.raises(Diverged, match="training: the loss of epoch 1"):
        input_aware.InputAware().run(replace(few, recipe=replace(few.recipe, lr=1e30)))


def test_input_aware_trains_as_fit_does(few: AttackContext) -> None:
    """With nothing planted the classifier's steps are those of the suite's loop."""
    recipe = replace(few.recipe, batch_size=len(few.train))  # one batch: the order plays no part
    few = replace(few, recipe=recipe, poison_rate=1 / 300)
    victim = input_aware.InputAware(diversity=0.0, cross=0.0).run(few)
    planted = triggered(victim.trigger, few.train.images[victim.poisoned])
    images, labels = few.train.images.clone(), few.train.labels.clone()
    images[victim.poisoned], labels[victim.poisoned] = planted, few.goal.target
    model = fit(few.build(), Split(images, labels), recipe, seed=0, progress=few.progress)
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, victim.model.get_parameter(name), atol=5e-3), name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("input_aware", {"width": 0}),
        ("input_aware", {"lr": 0.0}),
        ("input_aware", {"cross": -1.0}),
        ("input_aware", {"diversity": -1.0}),
        ("input_aware", {"density": 1.0}),
        ("input_aware", {"mask_share": 0.0}),
        ("clean_label", {"eps": -1.0}),
        ("clean_label", {"step": 0.0}),
        ("clean_label", {"steps": 0}),
        ("clean_label", {"surrogate_share": 0.0}),
        ("clean_label", {"amplitude": 256}),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ATTACKS[name](**settings)


def test_corners_larger_than_the_image() -> None:
    with pytest.raises(ValueError, match="do not fit 5x9"):
        ATTACKS["clean_label"]().make_trigger(torch.Size((1, 5, 9)), torch.Generator())
