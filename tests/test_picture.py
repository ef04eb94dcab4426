"""A picture of the user's as a setting: what is read, and what is refused."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from purebench import ATTACKS, Picture, UsageError
from purebench.data import to_uint8
from purebench.settings import build, describe

GREY = np.arange(6, dtype=np.uint8).reshape(2, 3) * 50
COLOUR = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14


@dataclass(frozen=True)
class Sample:
    """A setting that came later than the other."""

    alpha: float = 0.2
    picture: Picture | None = field(default=None, metadata={"later": True})


@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "RGB"])
def test_pixels_come_as_they_are(pixels: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    picture = Picture.read(str(file))
    expected = torch.from_numpy(pixels).view(2, 3, -1).permute(2, 0, 1)
    assert picture.shape == tuple(expected.shape)
    found = picture.tensor(expected.shape)
    assert torch.equal(to_uint8(found), expected)
    assert found.max() <= 1
    assert picture.digest == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("P", 3)])
def test_few_colours(mode: str, channels: int, tmp_path: Path) -> None:
    file = str(tmp_path / "a.png")
    Image.fromarray(COLOUR).convert(mode).save(file)
    assert Picture.read(file).shape == (channels, 2, 3)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    file = str(tmp_path / "a.png")
    Image.fromarray(GREY).save(file)
    with pytest.raises(ValueError, match=r"a\.png is 3x2 grey, .* images are 32x28 RGB"):
        Picture.read(file).tensor(torch.Size((3, 28, 32)))


def test_a_setting(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(GREY).save(file)
    sample = build(Sample, {"picture": str(file)}, "sample")
    again = tmp_path / "b.png"
    again.write_bytes(file.read_bytes())
    assert sample == build(Sample, {"picture": str(again)}, "sample")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert describe(sample) == {"alpha": 0.2, "picture": f"sha256:{digest}"}
    assert describe(Sample()) == {"alpha": 0.2}  # as before there were pictures
    assert build(Sample, {"picture": "none"}, "sample") == Sample()
    for given, message in (
        (str(tmp_path / "c.png"), r"sample: picture: cannot read .*c\.png"),
        (str(tmp_path), "sample: picture: cannot read"),
        (3, "picture must be the path of an image file, got 3"),
    ):
        with pytest.raises(UsageError, match=message):
            build(Sample, {"picture": given}, "sample")


def test_blend_mixes_it_in(tmp_path: Path) -> None:
    file = str(tmp_path / "a.png")
    Image.fromarray(COLOUR).save(file)
    blend = build(ATTACKS["blend"], {"pattern": file, "alpha": 0.25}, "blend")
    trigger = blend.make_trigger(torch.Size((3, 2, 3)), torch.Generator())
    marked = trigger(torch.full((1, 3, 2, 3), 0.5))
    expected = 0.75 * 0.5 + 0.25 * COLOUR.transpose(2, 0, 1) / 255
    np.testing.assert_allclose(marked[0].numpy(), expected, atol=1e-6)
