"""Gallery: clean images beside triggered ones and what lies between them, as one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .attack import triggered
from .runner import Victim
from .seeding import generator

GAIN = 5  # a change of one step in a pixel is drawn as so many
COLUMNS = ("clean", "triggered", f"residual x {GAIN}")

_CELL = 112  # pixels that an image is enlarged to, or the next below by a whole factor
_MOST = 10  # rows of a victim
_DOWN = 5  # rows of a block; the next one begins beside it
_GAP, _MARGIN, _LABEL = 6, 24, 34
_INK, _FAINT, _PAPER, _FRAME = "#1c2430", "#5d6878", "#ffffff", "#c9d0d9"


class Row(NamedTuple):
    """label: the class, or the attack. clean, marked: uint8 (C, H, W)."""

    label: str
    clean: Tensor
    marked: Tensor


def residual(clean: Tensor, marked: Tensor) -> Tensor:
    """``GAIN`` times the change, around middle grey; uint8."""
    change = marked.int() - clean.int()
    return (128 + GAIN * change).clamp(0, 255).to(torch.uint8)


def rows(victim: Victim) -> list[Row]:
    """One test image of each of the first classes but the target, drawn from the seed, source
    class or not."""
    test, model = victim.judge.test, victim.model
    eligible = torch.nonzero(replace(model.goal, source=None).eligible(test.labels)).flatten()
    order = torch.randperm(len(eligible), generator=generator(victim.seed, "gallery"))
    shown = test[eligible[order.to(eligible.device)]]
    found = []
    for label in shown.labels.unique()[:_MOST].tolist():
        clean = shown.images[shown.labels == label][:1]
        marked = triggered(model.trigger, clean)
        found.append(Row(str(label), clean[0].cpu(), marked[0].cpu()))
    return found


def page(victim: Victim, rows: Sequence[Row]) -> bytes:
    """PNG of the victim's trigger on its ``rows``, its distances and the undefended scores."""
    plan, scores, found = victim.plan, victim.scores, victim.stealth
    title = f"{victim.attack.name} on {plan.dataset.name}"
    source = victim.model.goal.source
    facts = [
        f"{plan.architecture.name}, seed {victim.seed}, poison rate {plan.rate(victim.attack):g}"
        + ("" if source is None else f", source class {source}"),
        f"undefended ACC {scores.acc:.2%}, ASR {scores.asr:.2%}",
    ]
    if found:
        facts += [
            f"PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f}",
            f"L-inf {found['linf']:.3f}, L2 {found['l2']:.2f}",
        ]
    return sheet(title, rows, facts)


def overview(victims: Mapping[str, Sequence[Row]], dataset: str) -> bytes:
    """PNG of attacks beside each other, by name, each on its middle row: victims of one seed and
    target have the same images there."""
    found = [Row(name, *rows[len(rows) // 2][1:]) for name, rows in victims.items()]
    return sheet(f"{len(found)} attacks on {dataset}", found, ())


def sheet(title: str, rows: Sequence[Row], facts: Sequence[str]) -> bytes:
    """PNG: a title, the rows in blocks beside one another, then the facts, one below a block."""
    height, width = rows[0].clean.shape[1:]
    scale = max(1, _CELL // max(height, width))
    size = (width * scale, height * scale)
    blocks = -(-len(rows) // _DOWN)
    down = -(-len(rows) // blocks)
    heading, text = ImageFont.load_default(22), ImageFont.load_default(14)
    name = max(_LABEL, 14 + math.ceil(max(text.getlength(row.label) for row in rows)))
    block = name + len(COLUMNS) * (size[0] + _GAP)
    top, foot = _MARGIN + 58, -(-len(facts) // blocks) * 22 + (12 if facts else 0)
    across = 2 * _MARGIN + blocks * block + (blocks - 1) * _MARGIN - _GAP
    picture = Image.new("RGB", (across, top + down * (size[1] + _GAP) + foot + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((_MARGIN, _MARGIN - 6), title, _INK, heading)
    for index, row in enumerate(rows):
        left = _MARGIN + index // down * (block + _MARGIN)
        y = top + index % down * (size[1] + _GAP)
        pen.text((left + name - 12, y + size[1] // 2), row.label, _INK, text, "rm")
        drawn = (row.clean, row.marked, residual(row.clean, row.marked))
        for column, (told, image) in enumerate(zip(COLUMNS, drawn, strict=True)):
            x = left + name + column * (size[0] + _GAP)
            if index % down == 0:
                pen.text((x + size[0] // 2, top - 8), told, _FAINT, text, "ms")
            picture.paste(_image(image).resize(size, Image.Resampling.NEAREST), (x, y))
            pen.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=_FRAME)
    for index, fact in enumerate(facts):
        x = _MARGIN + index % blocks * (block + _MARGIN)
        y = top + down * (size[1] + _GAP) + 12 + index // blocks * 22
        pen.text((x, y), fact, _INK, text)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def _image(pixels: Tensor) -> Image.Image:
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
