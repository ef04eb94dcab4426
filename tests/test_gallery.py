"""The gallery: what is drawn where."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from purebench import ATTACKS
from purebench.gallery import GAIN, Row, overview, residual, sheet

ROOT = Path(__file__).parent.parent


def test_residual() -> None:
    clean = torch.tensor([100, 100, 100, 0, 255], dtype=torch.uint8)
    marked = torch.tensor([100, 103, 98, 255, 0], dtype=torch.uint8)
    expected = [128, 128 + 3 * GAIN, 128 - 2 * GAIN, 255, 0]
    assert residual(clean, marked).tolist() == expected


def drawn(count: int, channels: int = 1, size: int = 28) -> Image.Image:
    clean = torch.full((channels, size, size), 40, dtype=torch.uint8)
    rows = [Row(str(index), clean, clean + 2 * index) for index in range(count)]
    image = Image.open(io.BytesIO(sheet("title", rows, ["one", "two", "three"])))
    assert image.mode == "RGB"
    return image


def levels(image: Image.Image) -> dict[int, int]:
    """Grey level -> pixels of it."""
    counts = image.convert("L").histogram()
    return {level: count for level, count in enumerate(counts) if count}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "side"), [(28, 112), (32, 96), (224, 224)])
def test_each_image_is_there_enlarged(channels: int, size: int, side: int) -> None:
    found = levels(drawn(3, channels, size))
    cell = side * side
    for level in (42, 44, 128, 138, 148):
        assert cell <= found[level] < cell * 1.05, level
    assert 4 * cell <= found[40] < 4.2 * cell  # three times clean, once triggered by nothing


def test_many_rows_stand_in_two_blocks() -> None:
    few, many = drawn(5), drawn(10)
    assert many.width > 1.8 * few.width
    assert many.height <= few.height
    assert levels(many)[40] >= 11 * 112 * 112


def test_attacks_stand_beside_each_other_on_their_middle_row() -> None:
    blank = torch.zeros(1, 28, 28, dtype=torch.uint8)
    rows = [Row(str(index), blank, torch.full_like(blank, 50 + index)) for index in range(3)]
    content = overview({f"a rather long name {index}": rows for index in range(6)}, "shapes")
    image = Image.open(io.BytesIO(content))
    found = levels(image)
    assert max(found.get(50, 0), found.get(52, 0)) < 100  # some of a letter's edge
    assert 6 * 112 * 112 <= found[51] < 6.1 * 112 * 112
    edge = image.convert("L").crop((0, 0, 12, image.height))
    assert list(levels(edge)) == [255]  # no name is cut off


def test_the_picture_in_the_documents_shows_every_attack() -> None:
    """As large as it would be; letters differ from one Pillow to the next."""
    blank = torch.zeros(1, 28, 28, dtype=torch.uint8)
    names = [name for name in ATTACKS.names() if name != "none"]
    content = overview({name: [Row("1", blank, blank)] for name in names}, "mnist")
    with Image.open(ROOT / "docs" / "figures" / "triggers.png") as picture:
        expected = Image.open(io.BytesIO(content))
        assert picture.height == expected.height
        assert picture.width == pytest.approx(expected.width, rel=0.03)
