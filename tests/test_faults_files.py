"""Files that are damaged, hostile or oddly named, and clocks that jump."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from purebench import DATASETS, LoadContext, PoisoningAttack, UsageError
from purebench import artifact as artifacts
from purebench.artifact import CARD, TENSORS, Damaged
from purebench.cli import OK, USAGE, main
from purebench.settings import build
from purebench.storage import sha256

from .faults import ROOT, WORDS, Told, left_over, results, run, victim

mnist: Any = import_module("purebench.datasets.mnist")
PLACES = 200


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves. Shared: ``copied`` is to be changed."""
    output = tmp_path_factory.mktemp("done")
    run(output)
    return output


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    for file in done.rglob("*"):
        if file.is_file():
            place = tmp_path / "results" / file.relative_to(done)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    return tmp_path / "results"


def damages(content: bytes) -> Iterator[bytes]:
    """One bit flipped, or the end cut off, at ``PLACES`` places drawn from a seed."""
    rng = random.Random(0)
    for number in range(PLACES):
        place = rng.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        yield bytes(flipped) if number % 2 else content[:place]


# --- damage -------------------------------------------------------------------------------------


def test_a_damaged_model_is_never_parsed(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "load", lambda _: pytest.fail("parsed before its digest"))
    of = victim(done)
    file = of.folder / TENSORS
    content = file.read_bytes()
    try:
        for damaged in damages(content):
            file.write_bytes(damaged)
            with pytest.raises(Damaged, match="sha256"):
                of._load()
    finally:
        file.write_bytes(content)


def test_a_damaged_card_gives_no_other_network(done: Path) -> None:
    """Of all its bits only those of blanks between its parts may be flipped."""
    of = victim(done)
    file = of.folder / CARD
    content = file.read_bytes()
    refused = 0
    try:
        for damaged in damages(content):
            file.write_bytes(damaged)
            try:
                of._load()
            except Damaged:
                refused += 1
            else:
                assert json.loads(damaged) == json.loads(content)
    finally:
        file.write_bytes(content)
    assert refused > PLACES // 2


@pytest.mark.parametrize("name", [TENSORS, CARD])
def test_what_is_damaged_is_kept_aside_and_made_again(name: str, copied: Path, done: Path) -> None:
    folder = victim(copied).folder
    damaged = (folder / name).read_bytes()[:-7]
    (folder / name).write_bytes(damaged)
    for record in copied.rglob("records/*/*.json"):
        record.unlink()
    told = Told()
    run(copied, told)
    assert "is damaged" in "".join(told.said)
    (aside,) = copied.glob("models/*.damaged-1")
    assert (aside / name).read_bytes() == damaged
    assert results(copied) == results(done)


def test_damaged_data_is_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpacked(*_: object) -> None:
        pytest.fail("unpacked before its digest")

    file = tmp_path / "mnist.xz"
    shutil.copy(mnist.FILE, file)
    monkeypatch.setattr(mnist.lzma, "decompress", unpacked)
    monkeypatch.setattr(mnist, "FILE", file)
    rng = random.Random(0)
    ctx = LoadContext(tmp_path, True, Told())
    size = file.stat().st_size
    cuts = sorted((rng.randrange(size) for _ in range(PLACES // 10)), reverse=True)
    with file.open("r+b", buffering=0) as held:
        for _ in range(PLACES):
            place, bit = rng.randrange(size), 1 << rng.randrange(8)
            for damaged in (True, False):
                held.seek(place)
                (byte,) = held.read(1)
                held.seek(place)
                held.write(bytes([byte ^ bit]))
                if damaged:
                    with pytest.raises(UsageError, match="restore the file"):
                        DATASETS["mnist"]().load(ctx)
        assert sha256(file.read_bytes()) == mnist.FILE_DIGEST  # each was undone
        for cut in cuts:
            held.truncate(cut)
            with pytest.raises(UsageError, match="restore the file"):
                DATASETS["mnist"]().load(ctx)


def test_a_truncated_record_is_not_done(copied: Path, done: Path) -> None:
    """Cut at every 64th byte: it is kept aside, and its cell run again to the same record."""
    path = next(copied.rglob("records/*/badnets-none-*.json"))
    content = path.read_bytes()
    cuts = range(0, len(content) - 1, 64)
    assert len(cuts) > 20
    for number, cut in enumerate(cuts, 1):
        path.write_bytes(content[:cut])
        told = Told()
        run(copied, told)
        assert f"kept as {path.name}.damaged-{number}" in "".join(told.said)
        assert path.with_name(f"{path.name}.damaged-{number}").read_bytes() == content[:cut]
        assert results(copied) == results(done)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cost": {"seconds": "1"}}, "cost.seconds"),
        ({"fingerprint": 3}, "fingerprint"),
        ({"benign_count": None}, "benign_count"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_record_with_a_field_of_a_wrong_type_is_not_done(
    copied: Path, done: Path, change: dict[str, Any], field: str
) -> None:
    path = next(copied.rglob("records/*/badnets-none-*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    told = Told()
    run(copied, told)
    (line,) = (line for line in told.said if "kept as" in line)
    assert f"not a record: {field} must be" in line
    assert results(copied) == results(done)


def test_a_record_that_cannot_be_read_ends_a_run(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(copied.rglob("records/*/badnets-none-*.json"))
    path.unlink()
    path.symlink_to(path)  # a loop, which nobody can open
    words = ["--attack", "badnets", "--defense", "none", "prune", "--quiet"]
    assert main([*WORDS, *words, "--output", str(copied)]) == USAGE
    assert capsys.readouterr().err.startswith(f"error: cannot read {path}: ")


# --- hostility ----------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self) -> Any:
        return open, ("ran", "w")


def vouched(folder: Path, content: bytes) -> None:
    """``content`` for the network's tensors, with a card that agrees."""
    card = json.loads((folder / CARD).read_text())
    card["sha256"] = sha256(content)
    del card["card_sha256"]
    card["card_sha256"] = artifacts._digest(card)
    (folder / CARD).write_text(json.dumps(card))
    (folder / TENSORS).write_bytes(content)


def edited(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        tensors = load(content)
        change(tensors)
        return bytes(save(tensors))

    return edit


def header(claims: int, text: bytes = b"{}") -> Callable[[bytes], bytes]:
    return lambda _: struct.pack("<Q", claims) + text


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "a pickle": lambda _: pickle.dumps(Bomb()),
    "a header of gigabytes": header(6 << 30),
    "a header of all there is": header(2**64 - 1),
    "a tensor of gigabytes": header(
        78, b'{"poisoned":{"dtype":"I64","shape":[1000000000],"data_offsets":[0,8000000000]}}'
    ),
    "overlapping tensors": header(
        121,
        b'{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
        b'"b":{"dtype":"I64","shape":[1],"data_offsets":[4,12]}}' + bytes(32),
    ),
    "no JSON": header(4, b"\xff\xfe{}"),
    "nothing": lambda _: b"",
    "another shape": edited(lambda held: held.update({"model.head.bias": torch.zeros(5)})),
    "a key too many": edited(lambda held: held.update({"model.extra": torch.zeros(1)})),
    "a key too few": edited(lambda held: held.pop("model.head.bias")),
    "no indices": edited(lambda held: held.pop("poisoned")),
    "indices that are none": edited(lambda held: held.update({"poisoned": torch.zeros(3)})),
    "planted nowhere": edited(lambda held: held.update({"planted.indices": torch.arange(2)})),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_model_is_refused_within_bounds(
    kind: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a card that vouches for it."""
    monkeypatch.chdir(tmp_path)
    of = victim(copied)
    vouched(of.folder, HOSTILE[kind]((of.folder / TENSORS).read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            of._load()
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [TENSORS, CARD])
def test_a_file_of_gigabytes_is_not_read(name: str, copied: Path) -> None:
    of = victim(copied)
    os.truncate(of.folder / name, 1 << 40)  # a hole, which takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(Damaged, match="1099511627776 bytes, at most"):
            of._load()
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_weights_that_are_not_finite_are_told(copied: Path) -> None:
    folder = victim(copied).folder
    spoil = edited(lambda held: held["model.head.bias"].fill_(torch.nan))
    vouched(folder, spoil((folder / TENSORS).read_bytes()))
    found = run(copied, force=False, defense=("fine_tune",))
    assert [record.status for record in found] == ["diverged"]


def test_an_image_that_claims_to_be_huge_is_not_decoded(tmp_path: Path) -> None:
    """A file of 100 bytes whose header says 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    bomb += chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(bomb)
    folder = build(DATASETS["image_folder"], {"path": str(tmp_path)}, "dataset image_folder")
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"4 files cannot be used: .*3600000000 pixels"):
            folder.load(LoadContext(tmp_path, True, Told()))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# --- names and clocks ---------------------------------------------------------------------------


def test_spaces_and_unicode_in_paths(
    tmp_path: Path,
    done: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "with spaces" / "naïve 雪 -- 'quoted'"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    Path("mein lauf ß.yaml").write_text("attack: badnets\ndefense: [none, prune]\n", "utf-8")
    words = [*WORDS, "--config", "mein lauf ß.yaml", "--output", "ergebnisse ü"]
    for _ in range(2):
        assert main(words) == OK
    assert "(from the cache)" in capsys.readouterr().err
    assert results(place / "ergebnisse ü") == results(done)
    (network,) = Path("ergebnisse ü").glob("models/*/model.safetensors")
    again = ["evaluate", "--model", str(network), "--architecture", "small_cnn"]
    again += ["--trigger", str(network.parent), "--dataset", "shapes", "--set=small_cnn.width=2"]
    assert main(again) == OK


def test_clocks_that_jump_change_nothing(
    copied: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backwards at every look, by an hour; and files are from 1970 and from 2100."""
    now = [4e9]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    run(tmp_path / "fresh")
    assert results(tmp_path / "fresh") == results(done)
    assert not left_over(tmp_path / "fresh")
    for number, file in enumerate(sorted(copied.rglob("*"))):
        os.utime(file, (number % 2 * 4.1e9,) * 2)
    monkeypatch.setattr(PoisoningAttack, "run", lambda *_: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime for path in copied.rglob("*.json")}
    run(copied)
    assert {path: path.stat().st_mtime for path in copied.rglob("*.json")} == before


def test_nothing_asks_what_time_it_is() -> None:
    """Durations are by the steady clock; what is newer is asked nowhere."""
    told = ("time.time(", "datetime", "st_mtime", "getmtime", "st_ctime")
    folders = ("purebench", "attacks", "defenses", "models", "datasets")
    texts = {
        file: file.read_text("utf-8")
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
    }
    assert len(texts) > 50
    assert [(file, word) for file, text in texts.items() for word in told if word in text] == []
