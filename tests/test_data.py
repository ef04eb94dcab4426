"""Splits, quantisation and the stratified draw. The benign draw: see test_datasets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from purebench import Split
from purebench.data import batches, stratified, to_float, to_uint8

BYTES = torch.arange(256, dtype=torch.uint8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_quantisation_is_undone_exactly() -> None:
    assert torch.equal(to_uint8(to_float(BYTES)), BYTES)
    assert to_float(BYTES).dtype == torch.float32
    assert to_float(BYTES)[[0, 255]].tolist() == [0, 1]


def test_quantisation_bears_noise_below_half_a_step() -> None:
    for noise in (-0.49 / 255, 0.49 / 255):
        assert torch.equal(to_uint8(to_float(BYTES) + noise), BYTES)


def test_quantisation_rounds_half_to_even_and_clips() -> None:
    steps = torch.tensor([-1.0, 0.5, 1.5, 2.5, 254.5, 255.4, 300.0], dtype=torch.float64)
    assert to_uint8(steps / 255).tolist() == [0, 0, 2, 2, 254, 255, 255]


def test_neither_changes_what_it_is_given() -> None:
    images, floats = BYTES.clone(), to_float(BYTES)
    to_float(images)
    to_uint8(floats)
    assert torch.equal(images, BYTES)
    assert torch.equal(floats, to_float(BYTES))


@pytest.mark.parametrize(("side", "sizes"), [(64, [4, 1]), (128, [1] * 5), (300, [1] * 5)])
def test_batches_of_large_images_are_smaller(side: int, sizes: list[int]) -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, side, side)
    parts = batches(images, 4)
    assert [len(part) for part in parts] == sizes
    assert torch.cat(parts)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sizes", "count", "shares"),
    [
        ([50, 50], 10, [5, 5]),
        ([60, 30, 10], 10, [6, 3, 1]),
        ([10, 10, 10], 10, [4, 3, 3]),  # 3 1/3 each; the odd one to the lower class
        ([50, 30, 20], 11, [6, 3, 2]),  # 5.5, 3.3, 2.2
        ([7, 0, 3], 5, [4, 0, 1]),  # 3.5 and 1.5: a tie, to the lower class
        ([3, 3], 6, [3, 3]),
    ],
)
def test_stratified(sizes: list[int], count: int, shares: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=rng(9))]
    drawn = stratified(labels, count, len(sizes), rng())
    assert torch.bincount(labels[drawn], minlength=len(sizes)).tolist() == shares
    assert torch.equal(drawn, drawn.unique())


def test_stratified_is_a_uniform_draw_from_the_seed() -> None:
    labels = torch.arange(100) % 2
    draws = [stratified(labels, 20, 2, rng(seed)) for seed in range(200)]
    assert torch.equal(draws[0], stratified(labels, 20, 2, rng(0)))
    times = torch.bincount(torch.cat(draws), minlength=100)  # 40 expected, deviation 5.7
    assert times.min() > 15
    assert times.max() < 65


@pytest.mark.parametrize("part", ["images", "labels"])
def test_a_digest_names_every_value(part: str) -> None:
    split = Split(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    before = split.digest()
    assert before == split[torch.arange(3)].digest()
    getattr(split, part).view(-1)[-1] = 1
    assert split.digest() != before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda images, labels: (images.float(), labels),
        lambda images, labels: (images[:, 0], labels),
        lambda images, labels: (images, labels.int()),
        lambda images, labels: (images, labels[:-1]),
        lambda images, labels: (images, labels[:, None]),
    ],
)
def test_a_split_is_checked(spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be"):
        Split(*spoil(images, labels))
