"""Reactivation: its samples, its steps, and that it works on a copy."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from purebench import BackdooredModel, Goal, Split
from purebench import reactivation as module
from purebench.evaluate import Judge
from purebench.reactivation import RECIPE, SAMPLES, poisoned_samples, reactivated


class Negative(nn.Module):
    """As a trigger: white becomes black."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1 - images


def split(count: int = 60) -> Split:
    """Image i is of grey level i and of class i mod 3."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return Split(images.contiguous(), torch.arange(count) % 3)


def test_samples_of_each_class_but_the_target() -> None:
    found = poisoned_samples(split(), Negative(), Goal(3, target=2), seed=0)
    assert found.labels.tolist() == [2] * SAMPLES
    true = [(255 - int(image[0, 0, 0])) % 3 for image in found.images]
    assert sorted(true) == [0] * 5 + [1] * 5
    again = poisoned_samples(split(), Negative(), Goal(3, target=2), seed=0)
    other = poisoned_samples(split(), Negative(), Goal(3, target=2), seed=1)
    assert found.digest() == again.digest() != other.digest()


def test_samples_all_to_all_and_of_few() -> None:
    found = poisoned_samples(split(6), Negative(), Goal(3, all_to_all=True), seed=0)
    true = [(255 - int(image[0, 0, 0])) % 3 for image in found.images]
    assert true == [0, 1, 2, 0, 1, 2]
    assert found.labels.tolist() == [1, 2, 0, 1, 2, 0]


def test_steps_by_hand() -> None:
    """Plain gradient descent on all samples at once, the recipe's number of steps."""
    samples = poisoned_samples(split(), Negative(), Goal(3, target=2), seed=0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    found = dict(reactivated(model, samples, seed=0).named_parameters())
    expected = copy.deepcopy(model)
    x = samples.images.float() / 255
    for _ in range(RECIPE.epochs):
        expected.zero_grad()
        nn.functional.cross_entropy(expected(x), samples.labels).backward()
        with torch.no_grad():
            for weight in expected.parameters():
                assert weight.grad is not None
                weight.sub_(RECIPE.lr * weight.grad)
    for name, weight in expected.named_parameters():
        assert torch.allclose(found[name], weight, atol=1e-7)
        assert not torch.equal(found[name], model.get_parameter(name))


def test_the_network_it_is_given_stays(victim: BackdooredModel) -> None:
    model = copy.deepcopy(victim.model).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = Split(torch.full((10, 1, 16, 16), 200, dtype=torch.uint8), torch.ones(10).long())
    found = reactivated(model, samples, seed=0)
    state = found.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not any(part.training for part in found.modules())
    moved = {name for name, value in before.items() if not torch.equal(state[name], value)}
    assert moved == {name for name, _ in model.named_parameters()}  # and no statistics


def test_a_copy_that_diverges_is_told_by_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECIPE", replace(RECIPE, lr=1e38))
    samples = poisoned_samples(split(), Negative(), Goal(3, target=2), seed=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Linear(8, 3))
    found = reactivated(model, samples, seed=0)
    assert Judge(split(), Negative(), Goal(3)).score(found).diverged
