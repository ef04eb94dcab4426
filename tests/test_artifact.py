"""A backdoored network on disk comes back bit for bit, or not at all."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from purebench import BackdooredModel, Goal, Split
from purebench import artifact as module
from purebench.artifact import CARD, TENSORS, Damaged, load_artifact, save_artifact
from purebench.attack import Planted
from purebench.storage import sha256

IDENTITY = {"attack": {"name": "stamp", "settings": {"alpha": 0.2}}, "seed": 0}
CPU = torch.device("cpu")


class Pattern(nn.Module):
    """A trigger with a tensor of its own."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.register_buffer("pattern", torch.zeros(1, size, size))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.get_buffer("pattern")


def network(width: int = 3, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=bias), nn.BatchNorm2d(width), nn.Flatten(), nn.LazyLinear(5)
    )


def blank() -> tuple[nn.Module, nn.Module]:
    model = network()
    model(torch.zeros(1, 1, 4, 4))
    return model, Pattern()


@pytest.fixture
def victim() -> BackdooredModel:
    """With every kind of number in it: -0, the smallest, the largest, NaN."""
    model, trigger = blank()
    model.get_parameter("0.bias").data = torch.tensor([-0.0, 1e-45, 3.4e38])
    model.get_buffer("1.running_mean")[0] = torch.nan
    trigger.get_buffer("pattern").uniform_()
    goal = Goal(5, target=3)
    notes = {"loss_by_epoch": [0.1, 1 / 3], "by_class": {10: 1, 9: 2}}
    return BackdooredModel(model.eval(), trigger.eval(), goal, torch.tensor([2, 5, 11]), notes)


@pytest.fixture
def folder(victim: BackdooredModel, tmp_path: Path) -> Path:
    save_artifact(tmp_path / "model", victim, IDENTITY)
    return tmp_path / "model"


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def test_round_trip(victim: BackdooredModel, folder: Path) -> None:
    found = load_artifact(folder, copy.deepcopy(IDENTITY), blank, CPU)
    assert found is not None
    assert bits(found.model) == bits(victim.model)
    assert bits(found.trigger) == bits(victim.trigger)
    assert found.goal == victim.goal
    assert torch.equal(found.poisoned, victim.poisoned)
    assert found.poisoned.dtype == torch.int64
    assert found.notes == json.loads(json.dumps(victim.notes))
    assert not any(layer.training for layer in (*found.model.modules(), found.trigger))
    assert sorted(path.name for path in folder.iterdir()) == [CARD, TENSORS]


def test_what_was_planted_comes_back(victim: BackdooredModel, folder: Path) -> None:
    found = load_artifact(folder, IDENTITY, blank, CPU)
    assert found is not None
    assert found.planted is None
    clean = Split(torch.randint(256, (6, 1, 4, 4), dtype=torch.uint8), torch.arange(6))
    images, labels = clean.images.clone(), clean.labels.clone()
    images[2, 0, 1, 3] ^= 1  # a cover image
    images[3, 0, 0, 0] ^= 128
    labels[3] = labels[5] = 0  # a poisoned image; one that the trigger leaves as it is
    victim.planted = Planted.between(clean, Split(images, labels))
    assert victim.planted.indices.tolist() == [2, 3, 5]
    save_artifact(folder, victim, IDENTITY)
    found = load_artifact(folder, IDENTITY, blank, CPU)
    assert found is not None
    assert found.planted is not None
    before = clean.digest()
    poisoned = found.planted.into(clean)
    assert torch.equal(poisoned.images, images)
    assert torch.equal(poisoned.labels, labels)
    assert clean.digest() == before


def test_the_same_network_gives_the_same_bytes(victim: BackdooredModel, folder: Path) -> None:
    before = [(folder / name).read_bytes() for name in (TENSORS, CARD)]
    save_artifact(folder, victim, IDENTITY)
    assert [(folder / name).read_bytes() for name in (TENSORS, CARD)] == before


def test_nothing_there(tmp_path: Path) -> None:
    assert load_artifact(tmp_path / "model", IDENTITY, blank, CPU) is None


# --- damage -------------------------------------------------------------------------------------


def _flip(name: str, at: float) -> Callable[[Path], None]:
    """One bit, ``at`` of the way through the file."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(at * len(content))] ^= 1
        (folder / name).write_bytes(content)

    return damage


def _cut(name: str, kept: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(kept * len(content))])

    return damage


def _replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content))


def void(_: object) -> None:
    """Ends an expression."""


def _edit(**changed: Any) -> Callable[[Path], None]:
    """Of the card; its digest stays."""

    def damage(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps({**card, **changed}))

    return damage


def _drop(key: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        del card[key]
        (folder / CARD).write_text(json.dumps(card))

    return damage


DAMAGE = {
    "tensors missing": lambda folder: (folder / TENSORS).unlink(),
    **{f"tensors cut at {kept}": _cut(TENSORS, kept) for kept in (0, 0.01, 0.5, 0.999)},
    **{f"tensors flipped at {at}": _flip(TENSORS, at) for at in (0, 0.1, 0.5, 0.999)},
    "tensors longer": lambda folder: (folder / TENSORS).open("ab").write(b"\0"),
    "tensors a pickle": _replace(TENSORS, pickle.dumps({"poisoned": [1]})),
    **{f"card cut at {kept}": _cut(CARD, kept) for kept in (0, 0.3, 0.9)},
    "card no JSON": _replace(CARD, b"\x80\x04K\x01."),
    "card no mapping": _replace(CARD, b"[1, 2]"),
    "card with another goal": _edit(goal={"num_classes": 5, "target": 0, "all_to_all": False}),
    "card with other notes": _edit(notes={}),
    "card with another schema": _edit(schema=2),
    "card with another identity": _edit(identity={**IDENTITY, "seed": 1}),
    "card with one key more": _edit(extra=1),
    **{f"card without {key}": _drop(key) for key in ("sha256", "card_sha256", "goal", "notes")},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_and_nothing_is_parsed(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DAMAGE[kind](folder)
    monkeypatch.setattr(module, "load", lambda _: pytest.fail("parsed before its digest"))
    with pytest.raises(Damaged):
        load_artifact(folder, IDENTITY, blank, CPU)


@pytest.mark.parametrize("at", [position / 40 for position in range(40)])
def test_no_flipped_bit_of_the_card_goes_unseen(
    at: float, victim: BackdooredModel, folder: Path
) -> None:
    """A flipped blank between keys may be; then what is loaded is what was saved."""
    _flip(CARD, at)(folder)
    try:
        found = load_artifact(folder, IDENTITY, blank, CPU)
    except Damaged:
        return
    assert found is not None
    assert found.goal == victim.goal
    assert bits(found.model) == bits(victim.model)


def test_another_models_artifact(folder: Path) -> None:
    with pytest.raises(Damaged, match="another model"):
        load_artifact(folder, {**IDENTITY, "seed": 1}, blank, CPU)


def test_a_pickle_is_never_run(folder: Path, tmp_path: Path) -> None:
    """Even under a card that vouches for it."""
    mark = tmp_path / "mark"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    content = pickle.dumps(Bomb())
    (folder / TENSORS).write_bytes(content)
    card = json.loads((folder / CARD).read_text())
    del card["card_sha256"]
    card["sha256"] = sha256(content)
    card["card_sha256"] = module._digest(card)
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(Damaged, match="Safetensor"):
        load_artifact(folder, IDENTITY, blank, CPU)
    assert not mark.exists()


@pytest.mark.parametrize(
    "build",
    [
        lambda: (network().append(nn.Linear(1, 1)), Pattern()),  # a tensor is missing
        lambda: (network(bias=False), Pattern()),  # one too many
        lambda: (network(width=4), Pattern()),  # wrong shapes
        lambda: (network(), Pattern(size=5)),
        lambda: (network(), nn.Identity()),
    ],
)
def test_tensors_that_do_not_fit(
    build: Callable[[], tuple[nn.Module, nn.Module]], folder: Path
) -> None:
    with pytest.raises(Damaged, match="state_dict"):
        load_artifact(folder, IDENTITY, build, CPU)


# --- interruption -------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_write_leaves_nothing_that_loads(
    stop: int, victim: BackdooredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the tensors are renamed, and between them and the card."""
    _interrupt(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(tmp_path, victim, IDENTITY)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ([] if stop == 1 else [TENSORS])
    assert load_artifact(tmp_path, IDENTITY, blank, CPU) is None


def test_an_interrupted_rewrite_is_told(
    victim: BackdooredModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New tensors beside the old card do not pass."""
    victim.model.get_parameter("0.bias").data += 1
    _interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(folder, victim, IDENTITY)
    with pytest.raises(Damaged, match="sha256"):
        load_artifact(folder, IDENTITY, blank, CPU)


def _interrupt(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The ``call``-th renaming does not come to pass."""
    calls, real = [0], os.replace

    def replace(source: str, target: Path) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
