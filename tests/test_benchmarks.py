"""What the benchmarks compare does the same work. No time is asserted."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import transforms

from benchmarks import gpu, pipeline, poisoning
from benchmarks._reference import AddToImage, ReferencePipeline, hwc
from benchmarks._timing import Spread, Times, interleave, ratios
from purebench import ATTACKS, DATASETS, Goal, LoadContext, PoisoningAttack, Recipe
from purebench.cli import INTERRUPTED
from purebench.settings import build
from purebench.training import batches, fit, sgd


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are not made comparable by collecting garbage before each."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def setting(channels: int = 1, all_to_all: bool = False) -> pipeline.Setting:
    sizes = {"train_count": 600, "test_count": 100, "channels": channels}
    shapes = build(DATASETS["shapes"], sizes, "shapes")
    source = shapes.load(LoadContext(Path("unused"), offline=True))
    return pipeline.Setting(
        source=source,
        model="small_cnn",
        recipe=Recipe(epochs=4, batch_size=32, lr=0.05),
        poison_rate=0.2,
        goal=Goal(source.num_classes, target=1, all_to_all=all_to_all),
    )


def pixels(reference: ReferencePipeline, name: str) -> Tensor:
    """All images of one of the reference's datasets, as ours are: (N, C, H, W)."""
    dataset = getattr(reference, name)
    stacked = np.stack([np.array(dataset.picture(i)) for i in range(len(dataset))])
    images = torch.from_numpy(stacked)
    return images[:, None] if images.ndim == 3 else images.movedim(3, 1)


@pytest.mark.parametrize("all_to_all", [False, True], ids=["to-one", "to-all"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("attack", ["blend", "badnets"])
def test_both_poison_the_same_pixels(
    attack: str, channels: int, all_to_all: bool, tmp_path: Path
) -> None:
    given = setting(channels, all_to_all)
    split, indices, trigger = given.poison(attack)
    judge = given.judge(trigger)
    reference = given.reference(tmp_path)
    reference.poison(indices.tolist(), pipeline.per_image(trigger))

    assert torch.equal(pixels(reference, "train"), split.images)
    assert reference.train.labels == split.labels.tolist()
    assert torch.equal(pixels(reference, "clean"), given.source.test.images)
    assert torch.equal(pixels(reference, "triggered"), judge.triggered.images)
    aims = given.goal.labels(judge.triggered.labels).tolist()
    triggered = reference.triggered
    assert [triggered[i][1] for i in range(len(triggered))] == aims
    assert len(list(tmp_path.rglob("*.png"))) == len(indices) + len(judge.triggered)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_attack_plants_what_its_definition_says(channels: int, tmp_path: Path) -> None:
    given = poisoning.setting(400, 14, channels)
    found = poisoning.measure(given, poisoning.NAMES, sample=40, repeats=1, scratch=tmp_path)
    assert [(result.name, result.planted) for result in found] == [
        (name, 40) for name in poisoning.NAMES
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_definition_that_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one step in many values, and by two in one."""
    given = poisoning.setting(400, 14, 1)
    for offset, message in ((1.0, "of the values differ"), (2.0, "2 steps apart")):
        wrong = AddToImage(np.full((14, 14), offset))
        monkeypatch.setattr(poisoning.Contest, "per_image", lambda *_, wrong=wrong: wrong)
        monkeypatch.setattr(poisoning, "_learnt", lambda _: identical())
        with pytest.raises(AssertionError, match=message):
            poisoning.measure(given, ["badnets"], sample=40, repeats=1, scratch=tmp_path)


def identical() -> type[PoisoningAttack]:
    """badnets with a trigger that does nothing."""
    body = {"make_trigger": lambda *_: torch.nn.Identity()}
    return type("Identical", (ATTACKS["badnets"],), body)


def test_poisoning_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        words = ["--images", "400", "--side", "14", "--channels", "1", "--sample", "5"]
        assert poisoning.main([*words, "--repeats", "1", "--scratch", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert all(name in shown for name in poisoning.NAMES)
    assert "400 images of 14x14x1" in shown


def test_both_load_the_same_batches(tmp_path: Path) -> None:
    given = setting(channels=3)
    split, indices, trigger = given.poison("blend")
    reference = given.reference(tmp_path)
    reference.poison(indices.tolist(), pipeline.per_image(trigger))
    (order,) = given.orders(1)
    own = list(batches(split, given.recipe, given.training_seed, epoch=0))
    usual = list(reference.train_loader(order))
    assert len(own) == len(usual) == 19
    normalise = given.build().get_submodule("normalise")
    for (images, labels), (theirs, their_labels) in zip(own, usual, strict=True):
        assert torch.equal(labels, their_labels)
        torch.testing.assert_close(normalise(images), theirs, atol=1e-6, rtol=1e-5)
    assert reference.load(order) == pipeline.load_ours(given, split, given.judge(trigger))


def test_both_train_and_score_alike(tmp_path: Path) -> None:
    given = setting()
    victim, found = given.run("badnets", epochs=4)
    reference = given.reference(tmp_path)
    reference.poison(victim.poisoned.tolist(), pipeline.per_image(victim.trigger))

    same = given.build()
    same.load_state_dict(victim.model.state_dict())
    counts = reference.score(pipeline.without_normalisation(same))
    assert counts == (found.clean_correct, found.triggered_as_target)
    assert found.acc > 0.9

    trained = pipeline.without_normalisation(given.build())
    losses = reference.fit(trained, given.orders(4))
    assert losses == pytest.approx(victim.notes["loss_by_epoch"], rel=0.02)


def test_augmentation_is_in_both(tmp_path: Path) -> None:
    plain = setting()
    recipe = Recipe(epochs=1, batch_size=32, crop=2, flip=True)
    given = pipeline.Setting(plain.source, plain.model, recipe, plain.poison_rate, plain.goal)
    assert given.orders(1) == plain.orders(1)
    transform = given.reference(tmp_path).train.transform
    assert isinstance(transform, transforms.Compose)
    names = [type(step).__name__ for step in transform.transforms]
    assert names == ["RandomCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"]
    fit(given.build(), plain.source.train, recipe, seed=0, progress=pipeline.QUIET)


def test_command_line_reports_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pipeline.json"
    words = ["--dataset", "shapes", "--images", "60", "--repeats", "1", "--epochs", "1"]
    threads = torch.get_num_threads()
    try:
        code = pipeline.main([*words, "--scratch", str(tmp_path), "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    content = json.loads(file.read_text())
    assert set(pipeline.TARGETS) | {"end to end"} == set(content["steps"])
    for step in content["steps"].values():
        assert len(step["ours"]["wall_seconds"]) == len(step["reference"]["cpu_seconds"]) == 1
    assert content["conditions"]["threads"] == 1
    shown = capsys.readouterr().out
    assert all(step in shown for step in content["steps"])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_command_line_refuses_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main(["--dataset", "shapse"]) == 2
    assert "did you mean 'shapes'?" in capsys.readouterr().err
    assert pipeline.main(["--repeats", "0"]) == 2


CPU = ("--device", "cpu", "--quick")
CPU_DEVICE = torch.device("cpu")


def test_gpu_command_measures_variants(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU there is no torch.compile; one that fails is told, and leaves the others alone."""

    def broken(recipe: Recipe) -> Any:
        if not torch.are_deterministic_algorithms_enabled():
            return sgd(recipe)
        raise RuntimeError("no such\nalgorithm")

    monkeypatch.setattr(gpu, "sgd", broken)
    assert gpu.main([*CPU, "--variants", "graphs", "determin"]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith(("+ ", "as fit", "compiled"))]
    assert [line.split("  ")[0] for line in lines] == [
        "+ graphs: as fit does",
        "as fit does, deterministic",
    ]
    assert "%" in lines[0]
    assert "failed: RuntimeError: no such algorithm" in lines[1]
    assert "n = 1, interleaved, 1 epochs each after 1 to warm up" in shown
    assert not torch.are_deterministic_algorithms_enabled()


def test_gpu_command_tells_what_it_has_when_it_is_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, defend = gpu.train, gpu.defend
    done: list[Any] = []

    def stopped(*given: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(given)
        return train(*given) if isinstance(given[0], gpu.Variant) else defend(*given)

    monkeypatch.setattr(gpu, "train", stopped)
    monkeypatch.setattr(gpu, "defend", stopped)
    assert gpu.main([*CPU, "--variants", "+ chan", "+ graphs", "--no-search"]) == INTERRUPTED
    told = capsys.readouterr()
    assert re.search(r"^\+ channels_last +\d", told.out, re.MULTILINE)
    assert re.search(r"^\+ graphs: as fit does +not measured", told.out, re.MULTILINE)
    assert "n = 0 to 1, interleaved" in told.out
    assert "convolutions as they come." in told.out
    assert "interrupted: what has been measured follows" in told.err
    done.clear()
    assert gpu.main([*CPU, "--defenses", "none", "clp"]) == INTERRUPTED
    told = capsys.readouterr()
    assert "interrupted" in told.err
    assert [line.split()[0] for line in told.out.splitlines()[2:4] if line] == ["none"]


def test_variants_take_the_same_steps() -> None:
    """From the same weights to the same, but for rounding; bf16 further off."""
    bench = gpu.Bench(
        "small_cnn", gpu.noise(64, (3, 32, 32), CPU_DEVICE), Recipe(epochs=3), 1, 1, 1, 8
    )
    ends: dict[str, Tensor] = {}
    for variant in gpu.VARIANTS:
        if variant.compiled:
            continue
        models: list[torch.nn.Module] = []

        class Watched(gpu.Bench):
            def build(self, models: list[torch.nn.Module] = models) -> torch.nn.Module:
                models.append(super().build())
                return models[-1]

        gpu.train(variant, Watched(**vars(bench)), gpu.Found())
        (model,) = models
        ends[variant.name] = torch.cat([w.detach().flatten() for w in model.parameters()])
    start = torch.cat([w.detach().flatten() for w in bench.build().parameters()])
    way = (ends["fp32"] - start).norm()
    for name, end in ends.items():
        apart = float((end - ends["fp32"]).norm() / way)
        assert apart < (1e-3 if "32" in name else 0.3), name


def test_work_is_counted() -> None:
    """PreActResNet18 takes 3.33 GFLOP to learn from an image of CIFAR-10's size."""
    split = gpu.noise(20, (3, 32, 32), CPU_DEVICE)
    bench = gpu.Bench("preact_resnet18", split, Recipe(), 1, 1, 1, 8)
    assert bench.flops() == pytest.approx(3.33e9, rel=0.01)


def test_gpu_command_times_defenses_and_the_solver(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*CPU, "--defenses", "none", "clp", "spectral"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:5]] == ["none", "clp", "spectral"]
    assert "failed" not in shown
    assert gpu.main([*CPU, "--solver"]) == 0
    shown = capsys.readouterr().out.splitlines()[2]
    assert float(shown.split()[-2]) < 1e-5  # worst error of columns that are all exact
    assert shown.split()[-3] == "8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "fp8"], "no variant is called fp8; known: fp32, "),
        (["--defenses", "cpl"], "did you mean 'clp'"),
        (["--defenses", "--precision", "bf16"], "precision bf16 is for CUDA"),
        (["--repeats", "0"], "must be at least 1"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--model", "lennet"], "did you mean 'lenet'"),
    ],
)
def test_gpu_command_refuses_bad_input(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--device", "cpu", "--images", "100", *words]) == 2
    assert message in capsys.readouterr().err


def test_rounds_alternate_and_ratios_are_of_pairs() -> None:
    ran: list[str] = []

    def contestant(name: str) -> Callable[[Times], None]:
        def run(times: Times) -> None:
            with times.measured():
                ran.append(name)

        return run

    found = interleave({name: contestant(name) for name in "ab"}, repeats=3)
    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert [len(times.wall_seconds) for times in found.values()] == [3, 3]
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread(12345.6, 0.01234, 5.0).text() == "12300 (0.0123 .. 5)"


def test_pictures_keep_their_channels() -> None:
    assert hwc(torch.zeros(2, 1, 4, 5)).shape == (2, 4, 5)
    assert hwc(torch.zeros(3, 4, 5)).shape == (4, 5, 3)
