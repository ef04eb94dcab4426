"""Small runs on shapes: what is cached, what fails alone, and what depends on what."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from purebench import (
    ATTACKS,
    DEFENSES,
    AttackContext,
    BackdooredModel,
    Defense,
    DefenseContext,
    NotApplicable,
    PoisoningAttack,
    UsageError,
    runner,
)
from purebench.attack import triggered
from purebench.config import RunConfig
from purebench.errors import Diverged
from purebench.progress import Progress
from purebench.record import Record, read_record
from purebench.runner import Victim, cell_fingerprint, execute, prepare, victim_identity
from purebench.scores import Scores
from purebench.seeding import isolated

SMALL = {"shapes": {"train_count": 400, "test_count": 100}, "mnist_fast": {"epochs": 1}}


class Told(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines_said: list[str] = []

    def say(self, text: str) -> None:
        self.lines_said.append(text)


@dataclass
class Run:
    """The records of one run, their files, which of them were there before, and what was said."""

    records: list[Record]
    paths: list[Path]
    reused: list[bool]
    said: str

    def __getitem__(self, defense: str) -> Record:
        (found,) = [record for record in self.records if record.cell.defense["name"] == defense]
        return found


def config(output: Path, **changed: Any) -> RunConfig:
    given: dict[str, Any] = {
        "attack": ("badnets",),
        "defense": ("none", "prune"),
        "dataset": "shapes",
        "benign_fraction": 0.1,
        "target": 1,
        "output": str(output),
        **changed,
    }
    return RunConfig(**{**given, "set": {**SMALL, **given.get("set", {})}})


def run(output: Path, **changed: Any) -> Run:
    told, paths, reused = Told(), [], []

    def done(_: Record, path: Path, was_there: bool) -> None:
        paths.append(path)
        reused.append(was_there)

    records = list(execute(prepare(config(output, **changed), told), done))
    return Run(records, paths, reused, "\n".join(told.lines_said))


def without_cost(records: list[Record]) -> list[Record]:
    return [replace(record, cost={}) for record in records]


def victim_of(output: Path, **changed: Any) -> Victim:
    plan = prepare(config(output, **changed), Progress(quiet=True))
    return Victim(plan, plan.attacks[0], plan.config.seeds[0])


# --- plug-ins that misbehave --------------------------------------------------------------------


@dataclass(frozen=True)
class Does(Defense):
    """``act`` is what it does; what it was given is kept in ``seen``."""

    act: ClassVar[Callable[[Any, DefenseContext], Any]]
    seen: ClassVar[list[tuple[dict[str, bytes], DefenseContext]]]

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        weights = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
        self.seen.append((weights, ctx))
        type(self).act(model, ctx)
        return model


Plant = Callable[..., Any]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Registers a defense that does ``act``, until the test ends; gives its ``seen``."""

    def enter(name: str, act: Callable[[Any, DefenseContext], Any], **attributes: Any) -> Any:
        body = {"act": staticmethod(act), "seen": [], "name": name, **attributes}
        made: Any = dataclass(frozen=True)(type(name, (Does,), {**body, "__module__": __name__}))
        monkeypatch.setitem(DEFENSES._classes, name, made)
        return body["seen"]

    return enter


@pytest.fixture
def plant_attack(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Registers an attack as badnets that first does ``act``; gives the contexts it saw."""

    def enter(name: str, act: Callable[[AttackContext], Any]) -> Any:
        seen: list[AttackContext] = []
        badnets: Any = ATTACKS["badnets"]

        @dataclass(frozen=True)
        class Planted(badnets):  # type: ignore[misc]
            def run(self, ctx: AttackContext) -> BackdooredModel:
                seen.append(ctx)
                act(ctx)
                victim: BackdooredModel = super().run(ctx)
                return victim

        Planted.name = name
        monkeypatch.setitem(ATTACKS._classes, name, Planted)
        return seen

    return enter


def nothing(*_: Any) -> None:
    """Does nothing."""


def raises(error: BaseException) -> Callable[..., None]:
    def act(*_: Any) -> None:
        raise error

    return act


def spoil(model: Any, _: DefenseContext) -> None:
    with torch.no_grad():
        model.conv1.weight[:] = torch.nan


def zero(model: Any, ctx: DefenseContext) -> None:
    """All it can lay hands on, and gradients are switched off."""
    torch.set_grad_enabled(False)
    for tensor in (*model.parameters(), ctx.benign.images, ctx.benign.labels):
        tensor.zero_()


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes any further training fail the test."""
    return lambda: monkeypatch.setattr(
        PoisoningAttack, "run", lambda *_: pytest.fail("trained again")
    )


# --- a run and its cache ------------------------------------------------------------------------


def test_a_run(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert [str(record.cell) for record in done.records] == [
        "badnets / none / seed 0", "badnets / prune / seed 0",
    ]  # fmt: skip
    for record, path in zip(done.records, done.paths, strict=True):
        assert record.status == "ok"
        assert record.benign_count == 40
        assert read_record(path) == record
        assert path.parent == tmp_path / "records" / "shapes-small_cnn"
        assert path.stem.endswith(record.fingerprint)
    none, prune = done["none"], done["prune"]
    assert none.after == none.before == prune.before
    assert none.victim == prune.victim
    assert none.before is not None
    assert (none.before.clean_count, none.before.triggered_count) == (100, 75)
    assert prune.notes["pruned"]
    assert len(none.victim_notes["loss_by_epoch"]) == 1


def test_a_second_run_is_answered_from_the_records(
    tmp_path: Path, no_training: Callable[[], None]
) -> None:
    first = run(tmp_path)
    no_training()
    second = run(tmp_path)
    assert first.reused == [False, False]
    assert second.reused == [True, True]
    assert second.records == first.records


def test_a_changed_setting_reruns_that_defense_alone(
    tmp_path: Path, no_training: Callable[[], None]
) -> None:
    first = run(tmp_path)
    no_training()
    second = run(tmp_path, set={"prune": {"budget": "0.5"}})
    assert second.reused == [True, False]
    assert second["none"] == first["none"]
    assert "defense" not in first["prune"].changed
    assert second["prune"].changed == {**first["prune"].changed, "defense": ["budget"]}
    assert len(second["prune"].notes["pruned"]) > len(first["prune"].notes["pruned"])
    assert run(tmp_path).reused == [True, True]


def test_a_victim_from_the_cache_gives_the_same_numbers(
    tmp_path: Path, no_training: Callable[[], None]
) -> None:
    first = run(tmp_path)
    for path in first.paths:
        path.unlink()
    no_training()
    second = run(tmp_path)
    assert second.reused == [False, False]
    assert without_cost(second.records) == without_cost(first.records)


def test_force_gives_identical_records_but_for_the_cost(tmp_path: Path) -> None:
    tuned = {"defense": ("none", "fine_prune"), "set": {"fine_prune": {"epochs": 2}}}
    first = run(tmp_path, **tuned)
    second = run(tmp_path, **tuned, force=True)
    assert second.reused == [False, False]
    assert without_cost(second.records) == without_cost(first.records)
    told = {"seconds", "peak_memory_bytes", "timings", "training_seconds"}
    assert first.records[0].cost.keys() == told


def test_force_trains_again(tmp_path: Path, plant_attack: Plant) -> None:
    seen = plant_attack("counted", nothing)
    for force, trainings in ((False, 1), (False, 1), (True, 2)):
        run(tmp_path, attack=("counted",), force=force)
        assert len(seen) == trainings


def test_a_damaged_model_is_set_aside_and_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    folder = victim_of(tmp_path).folder
    tensors = folder / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    first.paths[1].unlink()
    second = run(tmp_path)
    assert second.reused == [True, False]
    assert without_cost(second.records) == without_cost(first.records)
    assert "is damaged" in second.said
    assert "training badnets again" in second.said
    assert (folder.parent / f"{folder.name}.damaged-1" / "model.safetensors").is_file()
    assert victim_of(tmp_path)._load() is not None


@pytest.mark.parametrize("damage", ["cut", "another's"])
def test_a_damaged_record_is_set_aside_and_run_again(tmp_path: Path, damage: str) -> None:
    first = run(tmp_path)
    none, prune = first.paths
    content = none.read_bytes()
    prune.write_bytes(content if damage == "another's" else content[:-50])
    second = run(tmp_path)
    assert second.reused == [True, False]
    assert without_cost(second.records) == without_cost(first.records)
    assert "kept as" in second.said
    assert prune.with_name(f"{prune.name}.damaged-1").exists()


def test_changed_code_is_mentioned(tmp_path: Path) -> None:
    first = run(tmp_path)
    old = replace(first["prune"], machine={**first["prune"].machine, "sources": ["0", "1"]})
    old.write(first.paths[1])
    second = run(tmp_path)
    assert second.reused == [True, True]
    assert "the code of badnets or prune has changed" in second.said
    assert "none" not in second.said


def test_an_interrupt_leaves_what_is_finished(tmp_path: Path, plant: Plant) -> None:
    plant("stops", raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, defense=("none", "stops", "prune"))
    plant("stops", nothing)
    assert run(tmp_path, defense=("none", "stops", "prune")).reused == [True, False, False]


def test_stealth_is_measured_once_a_victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of badnets: 3 x 3 pixels of noise or of a figure become white."""
    first = run(tmp_path)
    found = first["none"].stealth
    assert found == first["prune"].stealth
    victim = victim_of(tmp_path)
    judge = victim.judge
    change = (judge.triggered.images.int() - judge.test.images[judge.eligible].int()).abs() / 255
    assert len(change) == 75  # fewer than the sample: all of them
    assert found["linf"] == pytest.approx(change.flatten(1).amax(1).mean().item(), abs=1e-5)
    assert 0 < found["ssim"] < 1
    file = victim.folder / "stealth.json"
    assert json.loads(file.read_text()) == found
    monkeypatch.setattr(runner, "stealth", lambda *_: pytest.fail("measured again"))
    assert victim_of(tmp_path).stealth == found
    monkeypatch.undo()
    for damaged in ('{"psnr": NaN}', "", "[]"):
        file.write_text(damaged)
        assert victim_of(tmp_path).stealth == found
        assert json.loads(file.read_text()) == found
    file.write_text(json.dumps({**found, "l2": 7.0}))
    assert run(tmp_path, force=True)["none"].stealth == found


def test_stealth_of_a_sample_is_drawn_from_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, defense=("none",))["none"].stealth
    monkeypatch.setattr(runner, "_COMPARED", 20)
    parts = [run(tmp_path, defense=("none",), force=True)["none"].stealth for _ in range(2)]
    assert parts[0] == parts[1] != whole
    assert parts[0]["l2"] == pytest.approx(whole["l2"], rel=0.1)


def test_the_control_has_no_stealth(tmp_path: Path) -> None:
    assert run(tmp_path, attack=("none",), defense=("none",))["none"].stealth == {}


# --- reactivation ---------------------------------------------------------------------------------


def test_reactivation_adds_to_a_record_and_changes_nothing_in_it(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    asked = run(tmp_path / "asked", reactivate=True)
    assert all(record.reactivated is None for record in plain.records)
    bare = [replace(record, reactivated=None) for record in asked.records]
    assert without_cost(bare) == without_cost(plain.records)
    for record in asked.records:
        assert record.reactivated is not None
        assert record.after is not None
        assert record.reactivated.triggered_count == record.after.triggered_count
    again = run(tmp_path / "asked", reactivate=True, force=True)
    assert without_cost(again.records) == without_cost(asked.records)


def test_a_record_answers_what_is_in_it(tmp_path: Path, no_training: Callable[[], None]) -> None:
    run(tmp_path)
    no_training()
    asked = run(tmp_path, reactivate=True)
    assert asked.reused == [False, False]
    assert run(tmp_path, reactivate=True).reused == [True, True]
    later = run(tmp_path)
    assert later.reused == [True, True]
    assert later.records == asked.records


def test_cells_without_a_network_or_a_trigger_are_done(tmp_path: Path, plant: Plant) -> None:
    plant("skips", raises(NotApplicable("no")))
    plant("spoils", spoil)
    given: dict[str, Any] = {"defense": ("skips", "spoils"), "reactivate": True}
    assert run(tmp_path, **given).reused == [False, False]
    assert run(tmp_path, **given).reused == [True, True]
    control: dict[str, Any] = {"attack": ("none",), "reactivate": True}
    assert {record.reactivated for record in run(tmp_path, **control).records} == {None}
    assert run(tmp_path, **control).reused == [True, True]


def test_samples_are_of_the_training_split(tmp_path: Path) -> None:
    victim = victim_of(tmp_path)
    train, samples = victim.attack_context.train, victim.samples
    assert len(samples) == 10
    assert samples.labels.tolist() == [1] * 10  # the target
    marked = triggered(victim.model.trigger, train.images[train.labels != 1])
    assert {image.numpy().tobytes() for image in samples.images} <= {
        image.numpy().tobytes() for image in marked
    }


# --- cells that do not finish -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "status", "error"),
    [
        (raises(KeyError("lost")), "failed", "KeyError: 'lost'"),
        (raises(RuntimeError("two\nlines")), "failed", "RuntimeError: two lines"),
        (raises(AssertionError()), "failed", "AssertionError"),
        (raises(NotApplicable("no convolution")), "skipped", "no convolution"),
        (raises(Diverged("loss is nan")), "diverged", "loss is nan"),
        (spoil, "diverged", "175 images have logits that are not finite"),
        (
            lambda _, ctx: ctx.notes.update(x=torch.nan),
            "failed",
            "ctx.notes['x'] cannot be written",
        ),
        (lambda _, ctx: ctx.notes.update(x={1, 2}), "failed", "ctx.notes['x'] cannot be written"),
        (lambda _, ctx: ctx.notes.update(x="x" * 2**19), "failed", "ctx.notes are 524,"),
        (lambda _, ctx: ctx.notes.update({1: 0, "x": 0}), "failed", "ctx.notes cannot be written"),
        (lambda _, ctx: setattr(ctx, "notes", []), "failed", "ctx.notes must be a dict, got list"),
        (
            lambda _, ctx: ctx.timings.update(x=torch.ones(1)),
            "failed",
            "ctx.timings['x'] must be seconds, 0 or more, got 'tensor([1.])'",
        ),
        (lambda _, ctx: ctx.timings.update(x=-1.0), "failed", "ctx.timings['x'] must be seconds"),
        (lambda _, ctx: ctx.timings.update(x=torch.inf), "failed", "ctx.timings['x'] must be sec"),
        (raises(ValueError("x" * 10**6)), "failed", f"ValueError: {'x' * 2000}…"),
    ],
)
def test_a_cell_fails_alone(
    tmp_path: Path, plant: Plant, act: Any, status: str, error: str
) -> None:
    expected = run(tmp_path / "alone")
    plant("odd", act)
    found = run(tmp_path / "beside", defense=("odd", "none", "prune"))
    assert without_cost(found.records[1:]) == without_cost(expected.records)
    odd = found["odd"]
    assert (odd.status, odd.before) == (status, expected["none"].before)
    assert odd.error is not None
    assert odd.error.startswith(error)
    assert read_record(found.paths[0]) == odd
    again = run(tmp_path / "beside", defense=("odd", "none", "prune"))
    assert again.reused == [status != "failed", True, True]


def test_notes_that_are_given_anew_are_kept(tmp_path: Path, plant: Plant) -> None:
    def act(_: Any, ctx: Any) -> None:
        ctx.notes, ctx.timings = {"mine": 1}, {"mine": np.float64(1)}

    plant("odd", act)
    found = run(tmp_path, defense=("odd",))
    assert found["odd"].notes == {"mine": 1}
    assert read_record(found.paths[0]).cost["timings"] == {"mine": 1.0}


def test_a_failure_tells_where(tmp_path: Path, plant: Plant) -> None:
    plant("odd", raises(KeyError("lost")))
    trace = run(tmp_path, defense=("odd",))["odd"].notes["traceback"]
    assert "test_runner.py" in "\n".join(trace)
    assert str(Path(__file__).parents[1]) not in "\n".join(trace)  # a record is shown around


def test_what_is_no_network(tmp_path: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("odd", nothing)
    monkeypatch.setattr(DEFENSES["odd"], "purify", lambda *_: None)
    assert run(tmp_path, defense=("odd",))["odd"].error == (
        "TypeError: purify returned NoneType, expected a network"
    )


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "failed"), (Diverged("nan"), "diverged")]
)
def test_an_attack_fails_alone_and_once(
    tmp_path: Path, plant_attack: Plant, error: Exception, status: str
) -> None:
    expected = run(tmp_path / "alone")
    seen = plant_attack("odd", raises(error))
    found = run(tmp_path / "beside", attack=("odd", "badnets"))
    assert [record.status for record in found.records] == [status, status, "ok", "ok"]
    assert all(record.before is None for record in found.records[:2])
    assert len(seen) == 1
    assert without_cost(found.records[2:]) == without_cost(expected.records)


def test_a_victim_whose_logits_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    """It is trained and kept, and no defense is tried on it."""
    real = PoisoningAttack.run

    def spoilt(self: PoisoningAttack, ctx: AttackContext) -> BackdooredModel:
        victim = real(self, ctx)
        spoil(victim.model, None)  # type: ignore[arg-type]
        return victim

    monkeypatch.setattr(PoisoningAttack, "run", spoilt)
    seen = plant("looks", nothing)
    record = run(tmp_path, defense=("looks",))["looks"]
    assert record.status == "diverged"
    assert record.before is not None
    assert record.before.nonfinite_count == 175
    assert record.after is None
    assert seen == []


# --- what depends on what -----------------------------------------------------------------------


def test_seeds_differ(tmp_path: Path) -> None:
    done = run(tmp_path, seeds=(0, 1), defense=("none",))
    first, second = done.records
    assert first.victim != second.victim
    assert first.victim_notes != second.victim_notes
    draws = [victim_of(tmp_path, seeds=(seed,)) for seed in (0, 1)]
    assert draws[0].benign.digest() != draws[1].benign.digest()
    assert not torch.equal(draws[0].model.poisoned, draws[1].model.poisoned)
    weights = [draw.build().get_parameter("head.weight") for draw in draws]
    assert not torch.equal(weights[0], weights[1])
    alone = run(tmp_path / "alone", seeds=(1,), defense=("none",))
    assert without_cost(alone.records) == without_cost([second])


def test_all_defenses_of_a_seed_meet_the_same_victim(tmp_path: Path, plant: Plant) -> None:
    """Though the first of them spoils its copy."""
    first, second = plant("first", zero), plant("second", nothing)
    run(tmp_path, defense=("first", "second"), attack=("badnets", "blend"))
    (weights, ctx), (blended, ctx_blend) = first
    (again, other), (blended_again, other_blend) = second
    assert weights == again
    assert blended == blended_again != weights
    assert (
        other.benign.digest() == other_blend.benign.digest() == victim_of(tmp_path).benign.digest()
    )
    assert ctx.seed == ctx_blend.seed != other.seed


def test_what_a_defense_holds_is_private(tmp_path: Path, plant: Plant) -> None:
    quick = {"fine_prune": {"epochs": 2}}
    expected = run(tmp_path / "alone", defense=("none", "fine_prune"), set=quick)
    plant("spoils", zero)
    found = run(tmp_path / "beside", defense=("spoils", "none", "fine_prune"), set=quick)
    assert [record.status for record in found.records] == ["ok"] * 3
    assert without_cost(found.records[1:]) == without_cost(expected.records)
    assert found["spoils"].after == Scores(25, 100, 0, 25, 75, 100, 0)  # all of class 0


def test_what_stands_beside_a_cell_changes_nothing(tmp_path: Path) -> None:
    quick = {"fine_prune": {"epochs": 2}}
    expected = run(tmp_path / "alone", defense=("fine_prune",), set=quick)
    beside = run(
        tmp_path / "beside", attack=("blend", "badnets"), defense=("prune", "fine_prune"), set=quick
    )
    assert without_cost(beside.records[-1:]) == without_cost(expected.records)


def test_the_world_outside_changes_nothing_and_is_left_alone(tmp_path: Path, plant: Plant) -> None:
    """A defense that draws from the global generators meets them seeded, and moves nobody's."""
    drawn: list[tuple[float, float, float]] = []

    def draw(*_: Any) -> None:
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
        if len(drawn) == 3:
            raise ValueError

    plant("draws", draw)
    for world in (1, 2, 3):
        with isolated(0):
            random.seed(world)
            np.random.seed(world)
            torch.manual_seed(world)
            before = state()
            run(tmp_path / str(world), defense=("draws",))
            assert state() == before
    assert drawn[0] == drawn[1] == drawn[2]


def state() -> list[Any]:
    """Of the global generators."""
    numpy_state: Any = np.random.get_state()
    return [random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()]


def images(split: Any) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_benign_images_are_of_the_training_split_unless_held_out(tmp_path: Path) -> None:
    train = victim_of(tmp_path)
    held = victim_of(tmp_path, benign_source="held_out")
    whole = images(train.attack_context.train)
    assert len(whole) == 400
    assert images(train.benign) < whole
    assert images(held.benign) == images(train.benign)
    assert images(held.attack_context.train) == whole - images(held.benign)
    assert not images(held.benign) & images(held.bundle.test)
    assert held.fingerprint != train.fingerprint


def test_only_held_out_images_make_the_benign_draw_part_of_the_victim(tmp_path: Path) -> None:
    def name(**changed: Any) -> str:
        return victim_of(tmp_path, **changed).fingerprint

    assert name() == name(benign_fraction=0.2) == name(defense=("fine_tune",))
    assert name(benign_source="held_out") != name(benign_source="held_out", benign_fraction=0.2)


def test_needs_are_filled_on_request_alone(tmp_path: Path, plant: Plant) -> None:
    plain = plant("plain", nothing)
    data = plant("data", nothing, needs=frozenset({"training_set"}))
    start = plant("start", nothing, needs=frozenset({"init"}))
    run(tmp_path, defense=("plain", "data", "start"))
    given = [seen[0][1] for seen in (plain, data, start)]
    assert [ctx.suspect is None for ctx in given] == [True, False, True]
    assert [ctx.initial is None for ctx in given] == [True, True, False]
    victim = victim_of(tmp_path)
    attack: Any = victim.attack
    poisoned, indices, _ = attack.poison(victim.attack_context)
    assert given[1].suspect.digest() == poisoned.digest()
    assert torch.equal(indices, victim.model.poisoned)
    fresh = victim.build().state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in given[2].initial.items())


def test_a_poisoned_training_set_is_made_once(
    tmp_path: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each defense has its own, and what the attack learnt for it is not learnt again."""
    attack: Any = ATTACKS["low_frequency"]
    calls, learn = [], attack.learn_trigger

    def counted(self: Any, *given: Any) -> None:
        calls.append(given)
        learn(self, *given)

    monkeypatch.setattr(attack, "learn_trigger", counted)
    needs = frozenset({"training_set"})
    spoils = plant("spoils", lambda _, ctx: ctx.suspect.images.zero_(), needs=needs)
    reads = plant("reads", nothing, needs=needs)
    given: dict[str, Any] = {
        "attack": ("low_frequency",),
        "defense": ("spoils", "reads"),
        "set": {"low_frequency": {"steps": 2}},
    }
    assert [record.status for record in run(tmp_path, **given).records] == ["ok", "ok"]
    assert len(calls) == 1
    victim = victim_of(tmp_path, **given)
    kept = victim.poisoned_split()
    assert len(calls) == 1
    assert kept.digest() == reads[0][1].suspect.digest() != spoils[0][1].suspect.digest()
    victim.model.planted = None  # as in an artifact from before it was kept
    assert victim.poisoned_split().digest() == kept.digest()
    assert len(calls) == 2


def test_an_attack_that_trains_by_itself_leaves_no_training_set(
    tmp_path: Path, plant: Plant
) -> None:
    plant("reads", nothing, needs=frozenset({"training_set"}))
    given = {
        "attack": ("input_aware",),
        "defense": ("reads",),
        "set": {"input_aware": {"width": 1}},
    }
    found = run(tmp_path, **given)["reads"]
    assert (found.status, found.error) == (
        "skipped",
        "input_aware leaves no poisoned training set",
    )


def test_the_control_is_not_poisoned(tmp_path: Path) -> None:
    done = run(tmp_path, attack=("none",), defense=("none",), poison_rate=0.3)
    assert done.records[0].cell.poison_rate == 0
    assert len(victim_of(tmp_path, attack=("none",)).model.poisoned) == 0


@pytest.mark.parametrize(
    ("changed", "count"), [({}, 40), ({"poison_rate": 0.3}, 120), ({"all_to_all": True}, 40)]
)
def test_the_poison_rate_is_the_users_or_the_attacks(
    tmp_path: Path, changed: dict[str, Any], count: int
) -> None:
    victim = victim_of(tmp_path, **changed)
    assert len(victim.model.poisoned) == count
    assert victim.model.goal.all_to_all is changed.get("all_to_all", False)


CHANGES: dict[str, Any] = {
    "dataset": {"name": "other"},
    "model": {"name": "other"},
    "attack": {"name": "other"},
    "defense": {"name": "other"},
    "recipe": {"name": "other"},
    "seed": 1,
    "poison_rate": 0.2,
    "clean_label": True,
    "target": 2,
    "all_to_all": True,
    "benign_fraction": 0.2,
    "benign_source": "held_out",
}


def test_every_part_of_a_cell_is_in_its_fingerprint(tmp_path: Path) -> None:
    plan = prepare(config(tmp_path), Progress(quiet=True))
    cell = plan.cell(plan.attacks[0], plan.defenses[0], 0)
    assert CHANGES.keys() == vars(cell).keys()
    changed = [replace(cell, **{name: value}) for name, value in CHANGES.items()]
    assert len({cell_fingerprint(one) for one in [cell, *changed]}) == len(CHANGES) + 1
    same_victim = [
        name
        for name, one in zip(CHANGES, changed, strict=True)
        if victim_identity(one) == victim_identity(cell)
    ]
    assert same_victim == ["defense", "benign_fraction"]


# --- what cannot be run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attack": ()}, "at least one attack"),
        ({"attack": ("badnet",)}, "did you mean 'badnets'"),
        ({"defense": ("prun",)}, "did you mean 'prune'"),
        ({"dataset": "shape"}, "did you mean 'shapes'"),
        ({"model": "small_cn"}, "did you mean 'small_cnn'"),
        ({"recipe": "mnist_fas"}, "did you mean 'mnist_fast'"),
        ({"target": 4}, "target class 4 does not exist"),
        ({"poison_rate": 0.0}, "poison rate 0.0"),
        ({"poison_rate": 1.5}, "poison rate 1.5"),
        ({"benign_fraction": 0.001}, "at least 2 a class"),
        ({"benign_fraction": 1.0}, "between 0 and 1"),
        ({"set": {"badnets": {"size": "17"}}}, "size 17"),
        ({"set": {"badnets": {"sise": "3"}}}, "did you mean 'size'"),
        ({"set": {"blend": {"alpha": "0.1"}}}, "no part of this run"),
        ({"set": {"mnist_fast": {"precision": "bf16"}}}, "bf16 is for CUDA"),
        ({"model": "one_hidden", "set": {"one_hidden": {"patch": "5"}}}, "does not fit 1x16x16"),
        ({"device": "cuda:99"}, "is not there"),
        ({"device": "abacus"}, "unknown device"),
    ],
)
def test_what_cannot_be_run_is_told_before_training(
    tmp_path: Path, changed: dict[str, Any], message: str, no_training: Callable[[], None]
) -> None:
    no_training()
    with pytest.raises(UsageError, match=message) as told:
        run(tmp_path, **changed)
    assert "\n" not in str(told.value)


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(UsageError, match="cannot write to the output folder"):
        run(tmp_path / "results")
