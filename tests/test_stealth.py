"""Stealth against hand-computed cases."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from purebench.data import to_uint8
from purebench.scores import CEILING, STEALTH_METRICS
from purebench.stealth import ssim, stealth


def test_one_value_of_each_image() -> None:
    """Two images of 2 x 2: one changed by 51 of 255 in one pixel, one not at all."""
    clean = torch.full((2, 1, 2, 2), 100, dtype=torch.uint8)
    marked = clean.clone()
    marked[0, 0, 0, 0] += 51
    found = stealth(clean, marked)
    assert tuple(found) == STEALTH_METRICS
    assert found["psnr"] == pytest.approx((-10 * math.log10(0.2**2 / 4) + CEILING) / 2)
    assert found["linf"] == pytest.approx(0.1)
    assert found["l2"] == pytest.approx(0.1)
    assert 0.5 < found["ssim"] < 1


def test_l2_is_the_length_over_all_values() -> None:
    clean = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    found = stealth(clean, clean + 51)
    assert found["l2"] == pytest.approx(0.2 * math.sqrt(48), abs=1e-6)
    assert found["psnr"] == pytest.approx(-20 * math.log10(0.2), abs=1e-5)


def test_equal_images_give_finite_numbers() -> None:
    images = torch.randint(256, (3, 1, 16, 16), dtype=torch.uint8)
    found = stealth(images, images)
    assert found == {"psnr": CEILING, "ssim": 1, "linf": 0, "l2": 0}
    json.dumps(found, allow_nan=False)


def test_the_ceiling_lies_above_the_least_change() -> None:
    assert 10 * math.log10(255**2 * 224 * 224 * 3) < CEILING + 0.01


def test_ssim_of_even_planes() -> None:
    """Without variance only the luminance term is left: (2 a b + C1) / (a^2 + b^2 + C1)."""
    a, b = 0.2, 0.6
    found = ssim(torch.full((1, 1, 12, 15), a), torch.full((1, 1, 12, 15), b))
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_ssim_of_one_window() -> None:
    """An 11 x 11 image holds the window once: weighted moments, written out."""
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 11, 11))
    squares = (np.arange(11) - 5.0) ** 2
    weights = np.exp(-(squares[:, None] + squares[None]) / (2 * 1.5**2))
    weights /= weights.sum()

    def mean(values: np.ndarray) -> float:
        return float((weights * values).sum())

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean((x - mx) ** 2), mean((y - my) ** 2), mean((x - mx) * (y - my))
    expected = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
    expected /= (mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)
    found = ssim(torch.from_numpy(x)[None, None], torch.from_numpy(y)[None, None])
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_ssim_is_the_mean_over_channels_and_places() -> None:
    first, second = torch.rand(2, 1, 3, 13, 12, generator=torch.Generator().manual_seed(0))
    whole = ssim(first, second).item()
    windows = [
        ssim(first[:, c, None, y : y + 11, x : x + 11], second[:, c, None, y : y + 11, x : x + 11])
        for c in range(3)
        for y in range(3)
        for x in range(2)
    ]
    assert whole == pytest.approx(torch.cat(windows).mean().item(), rel=1e-9)


def test_a_negative_is_far_away_and_small_images_do() -> None:
    image = torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    assert ssim(image, 1 - image).item() < 0
    assert ssim(image, image).item() == pytest.approx(1)
    assert ssim(image, to_uint8(image) / 255).item() > 0.99
