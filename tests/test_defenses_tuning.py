"""Defenses that train a network again: the core of each, held against a computation by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import (
    DEFENSES,
    MODELS,
    AttackContext,
    BackdooredModel,
    DefenseContext,
    NotApplicable,
    Recipe,
    Split,
    Task,
    Verdict,
    fit,
)
from purebench import contract as c
from purebench.adversarial import ascend, pgd
from purebench.attack import PoisoningAttack, triggered
from purebench.config import RunConfig
from purebench.data import to_float
from purebench.evaluate import accuracy, evaluating
from purebench.progress import Progress
from purebench.runner import execute, prepare
from purebench.seeding import isolated
from purebench.training import cross_entropy


def module(name: str) -> Any:
    return import_module(f"purebench.defenses.{name}")


def defense(name: str, **settings: Any) -> Any:
    return DEFENSES[name](**settings)


@pytest.fixture
def suspect(victim: BackdooredModel) -> Any:
    """A private copy of the backdoored network, in evaluation mode."""
    return copy.deepcopy(victim.model).eval()


@pytest.fixture
def few(defender: DefenseContext) -> DefenseContext:
    """The defender with 100 images and notes of its own."""
    images, labels = defender.benign.images[:100], defender.benign.labels[:100]
    return replace(defender, benign=Split(images.clone(), labels.clone()), notes={})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def moved(model: nn.Module, before: nn.Module) -> set[str]:
    """Weights and statistics that are not as they were."""
    old = before.state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}


# --- the training loop --------------------------------------------------------------------------


def test_fit_descends_as_it_is_told() -> None:
    """Adam's first step moves each weight that has a slope by the learning rate, against it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    before = copy.deepcopy(model)
    split = Split(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(3).long())
    recipe = Recipe(epochs=1, lr=0.25, weight_decay=0.0, schedule="constant")
    fit(model, split, recipe, seed=0, progress=Progress(quiet=True), descent=torch.optim.Adam)
    change = model[1].weight - before[1].weight  # type: ignore[operator]
    torch.testing.assert_close(change.detach(), torch.tensor([[0.25] * 4, [-0.25] * 4]))


# --- passes -------------------------------------------------------------------------------------


def test_running_statistics_stay_and_modes_return(suspect: Any) -> None:
    suspect.train()
    suspect.norm2.eval()
    modes = {name: part.training for name, part in suspect.named_modules()}
    before = statistics(suspect)
    with evaluating(suspect):
        found = suspect(noise(5, 1, 16, 16))
    assert same(before, statistics(suspect))
    assert modes == {name: part.training for name, part in suspect.named_modules()}
    torch.testing.assert_close(found, suspect.eval()(noise(5, 1, 16, 16)))


def test_with_weights_leaves_the_network(suspect: Any) -> None:
    before, images = statistics(suspect), noise(5, 1, 16, 16)
    doubled = {"head.weight": 2 * suspect.head.weight, "head.bias": 2 * suspect.head.bias}
    network = module("_passes").with_weights(suspect.train(), doubled)
    found = network(images)
    assert same(before, statistics(suspect))
    torch.testing.assert_close(found, 2 * suspect(images))  # this one moves them


def test_renewed_statistics_are_the_mean_over_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=0.3))
    images = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    module("_passes").renew_statistics(model, images, batch_size=2)
    norm: Any = model[0]
    assert norm.running_mean.item() == pytest.approx((0.1 + 0.7) / 2)
    assert norm.running_var.item() == pytest.approx((0.02 + 0.18) / 2)  # over n - 1
    assert norm.momentum == 0.3
    assert not model.training


def test_the_head_must_be_linear() -> None:
    with pytest.raises(NotApplicable, match="not linear"):
        module("_passes").head(
            nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()), torch.zeros(1, 1, 1, 1).byte()
        )


# --- ft_sam -------------------------------------------------------------------------------------


def test_sharpness_by_hand() -> None:
    """Loss (a^2 + 4 b^2) / 2 at a = 2, b = 1: slopes (2, 4), scaled by the weights (4, 4), so that
    e = 0.1 (2 * 4, 1 * 4) / sqrt(32)."""
    weights: Any = {
        "a": torch.tensor([2.0], requires_grad=True),
        "b": torch.tensor([1.0], requires_grad=True),
    }

    def loss(w: dict[str, Tensor]) -> Tensor:
        return ((w["a"] ** 2 + 4 * w["b"] ** 2) / 2).sum()

    slopes = torch.autograd.grad(loss(weights), list(weights.values()))
    worst = module("ft_sam").worst(weights, slopes, 0.1)
    a, b = 2 + 0.8 / math.sqrt(32), 1 + 0.4 / math.sqrt(32)
    assert worst["a"].item() == pytest.approx(a)
    assert worst["b"].item() == pytest.approx(b)
    loss(worst).backward()
    assert [weight.grad.item() for weight in weights.values()] == pytest.approx([a, 4 * b])


def test_no_other_weights_nearby_are_worse() -> None:
    """To first order, among all that lie as far in units of their own size."""
    w, g = noise(50, seed=1) - 0.5, noise(50, seed=2) - 0.5
    e = module("ft_sam").worst({"w": w}, [g], 0.01)["w"] - w
    assert (e / w).norm().item() == pytest.approx(0.01, rel=1e-4)
    for seed in range(3, 20):
        other = w * F.normalize(noise(50, seed=seed) - 0.5, dim=0) * 0.01
        assert other @ g < e @ g


def test_sharpness_moves_the_statistics_once(suspect: Any) -> None:
    images, labels = noise(8, 1, 16, 16), torch.arange(8) % 4
    plain = copy.deepcopy(suspect).train()
    plain(images)
    defense("ft_sam").worst_loss(suspect.train(), images, labels)
    assert same(statistics(suspect), statistics(plain))


def test_without_radius_it_is_fine_tuning(suspect: Any, few: DefenseContext) -> None:
    plain = defense("fine_tune", epochs=2).purify(copy.deepcopy(suspect), few)
    settings = {"rho": 0.0, "label_smoothing": 0.0, "epochs": 2}
    found = defense("ft_sam", **settings).purify(suspect, few)
    torch.testing.assert_close(found.state_dict(), plain.state_dict())


# --- fst ----------------------------------------------------------------------------------------


def test_fst_shifts_the_head_and_keeps_its_length(suspect: Any, few: DefenseContext) -> None:
    old = suspect.head.weight.detach().clone()
    cosines = []
    for alpha in (0.0, 1.0):
        ctx = replace(few, notes={})
        model: Any = defense("fst", alpha=alpha, epochs=10).purify(copy.deepcopy(suspect), ctx)
        weight = model.head.weight.detach()
        assert weight.norm().item() == pytest.approx(old.norm().item(), rel=1e-5)
        cosine = (weight * old).sum() / weight.norm() / old.norm()
        assert ctx.notes["head_cosine"] == pytest.approx(float(cosine), abs=1e-5)
        cosines.append(float(cosine))
    assert cosines[1] < cosines[0] - 0.01


def test_fst_penalty_by_hand(suspect: Any, few: DefenseContext) -> None:
    """Of the first step: cross-entropy of the fresh head, and alpha times cos(new, old)."""
    head = suspect.head
    old = head.weight.detach().clone()
    notes: list[dict[str, Any]] = [{}, {}]
    for alpha, facts in zip((0.0, 3.0), notes, strict=True):
        settings = {"alpha": alpha, "epochs": 1, "batch_size": 100}
        defense("fst", **settings).purify(copy.deepcopy(suspect), replace(few, notes=facts))
    with isolated(few.derive("head")):
        head.reset_parameters()
    fresh = head.weight.detach()
    cosine = float((fresh * old).sum() / fresh.norm() / old.norm())
    added = notes[1]["loss_by_epoch"][0] - notes[0]["loss_by_epoch"][0]
    assert added == pytest.approx(3 * cosine, rel=1e-3, abs=2e-6)


# --- adversarial images -------------------------------------------------------------------------


def test_pgd_raises_the_loss_within_its_ball(suspect: Any, few: DefenseContext) -> None:
    images, labels = to_float(few.benign.images), few.benign.labels
    rng = torch.Generator().manual_seed(0)
    hard = pgd(suspect, images, labels, eps=0.1, step=0.03, steps=5, rng=rng)
    assert (hard - images).abs().max() <= 0.1 + 1e-6
    with torch.no_grad():
        easy, raised = (cross_entropy(suspect, x, labels) for x in (images, hard))
    assert raised > 2 * easy


def test_ascend_takes_any_objective() -> None:
    """To the brightest images in the ball."""
    images = torch.tensor([0.2, 0.95]).view(2, 1, 1, 1)
    found = ascend(lambda x: x.sum(), images, eps=0.1, step=0.06, steps=3)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.3, 1.0]))


def test_adversarial_tuning_hardens(suspect: Any, few: DefenseContext) -> None:
    images, labels = to_float(few.benign.images), few.benign.labels

    def hard_loss(model: nn.Module) -> float:
        hard = pgd(model, images, labels, eps=20 / 255, step=5 / 255, steps=7)
        with torch.no_grad():
            return float(cross_entropy(model, hard, labels))

    settings = {"eps": 20.0, "step": 5.0, "epochs": 3, "batch_size": 25}
    plain = defense("fine_tune", epochs=3, batch_size=25).purify(copy.deepcopy(suspect), few)
    tuned = defense("adversarial_tune", **settings).purify(suspect, few)
    assert hard_loss(tuned) < 0.8 * hard_loss(plain)


# --- i_bau --------------------------------------------------------------------------------------

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
B = torch.tensor([[1.0, -1.0, 0.5], [0.3, 2.0, 1.0]], dtype=torch.float64)
AIM = torch.tensor([1.0, -2.0], dtype=torch.float64)


def inner(x: Tensor, w: Tensor) -> Tensor:
    return x @ A @ x / 2 - x @ B @ w + x.pow(4).sum() / 20


def outer(x: Tensor, w: Tensor) -> Tensor:
    return (x - AIM).square().sum() + w.sin().sum()


def smallest(w: Tensor) -> Tensor:
    x = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        x.requires_grad_()
        x = (x - 0.2 * torch.autograd.grad(inner(x, w), x)[0]).detach()
    return x


def test_implicit_slope_is_the_finite_difference() -> None:
    w = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64, requires_grad=True)
    kept = w.detach().clone()
    slopes = {}
    for terms in (0, 80):
        loss = module("_hypergradient").implicit(
            lambda x: outer(x, w), lambda x: inner(x, w), smallest(kept), step=0.2, terms=terms
        )
        assert loss.item() == pytest.approx(outer(smallest(kept), kept).item())
        (slopes[terms],) = torch.autograd.grad(loss, w)
    for index in range(3):
        side = [kept.clone(), kept.clone()]
        for way, point in zip((1, -1), side, strict=True):
            point[index] += way * 1e-5
        high, low = (outer(smallest(point), point).item() for point in side)
        difference = (high - low) / 2e-5
        assert slopes[80][index].item() == pytest.approx(difference, rel=1e-4)
        assert abs(slopes[0][index].item() - difference) > 0.01


def test_one_perturbation_hurts_all_images_within_its_radius(
    suspect: Any, few: DefenseContext
) -> None:
    images, labels = to_float(few.benign.images), few.benign.labels
    parts = [(images, labels)] * 5
    change = defense("i_bau", rms=0.125).perturbation(suspect, parts, few.benign.shape)
    assert change.shape == (1, 16, 16)
    assert change.norm() <= 2 + 1e-5
    with torch.no_grad():
        easy, hard = (cross_entropy(suspect, x, labels) for x in (images, images + change))
    assert hard > 2 * easy


def test_i_bau_is_bounded_by_its_radius_alone_where_it_has_one(
    suspect: Any, few: DefenseContext
) -> None:
    parts = [(to_float(few.benign.images), few.benign.labels)] * 5
    lengths = [
        float(defense("i_bau", rms=rms).perturbation(suspect, parts, few.benign.shape).norm())
        for rms in (0.125, None)
    ]
    assert lengths[0] <= 2 + 1e-5 < lengths[1]


@pytest.mark.parametrize("name", ["adversarial_tune", "i_bau", "neural_cleanse", "npd", "sau"])
def test_perturbed_images_move_no_statistics(name: str, suspect: Any, few: DefenseContext) -> None:
    before = statistics(suspect)
    model = defense(name, **BRIEF[name]).purify(suspect, few)
    assert same(before, statistics(model))


# --- sau ----------------------------------------------------------------------------------------


def test_unlikely_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0], [900.0, 0.0, 0.0]])
    found = module("_unlikely").unlikely(logits, torch.tensor([0, 0, 0]))
    assert found.tolist() == pytest.approx([math.log(3 / 2), math.log(2), 900 - math.log(2)])


def test_sau_unlearns_shared_mistakes_alone() -> None:
    """Of three images the suspect network gets two wrong, as 1 and as 2; the mean is over three."""
    logits = torch.tensor([[0.0, math.log(2), 0.0], [9.0, 9.0, 9.0], [5.0, 0.0, 0.0]])
    labels, wrong = torch.tensor([0, 1, 0]), torch.tensor([1, 2, 0])
    found = module("sau").unlearning_loss(logits, labels, wrong)
    assert found.item() == pytest.approx((math.log(2) + math.log(3 / 2)) / 3)
    assert module("sau").unlearning_loss(logits, labels, labels).item() == 0


def test_divergence_by_hand() -> None:
    """Equal answers: 0; sure and contrary ones: log 2; (1/2, 1/2) and (1, 0), by hand."""
    first = torch.tensor([[1.0, 3.0], [50.0, -50.0], [0.0, 0.0]])
    second = torch.tensor([[2.0, 4.0], [-50.0, 50.0], [60.0, -60.0]])
    found = module("sau").divergence(first, second)
    half = (math.log(2 / 3) + math.log(2)) / 4 + math.log(4 / 3) / 2
    assert found.tolist() == pytest.approx([0, math.log(2), half], abs=1e-6)


# --- npd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_polarizer_is_a_layer_behind_the_convolution(bias: bool) -> None:
    conv = nn.Conv2d(2, 3, 3, bias=bias)
    polarizer = module("npd").Polarizer(conv)
    assert polarizer.distance() == 0
    for name, weight in polarizer().items():
        torch.testing.assert_close(weight, dict(conv.named_parameters())[name])
    with torch.no_grad():
        polarizer.matrix.copy_(noise(3, 3))
        if bias:
            polarizer.shift.copy_(noise(3, seed=1))
    images = noise(2, 2, 5, 5)
    folded = F.conv2d(images, **polarizer())
    behind = torch.einsum("ij,njhw->nihw", polarizer.matrix, conv(images))
    if bias:
        behind = behind + polarizer.shift[:, None, None]
    torch.testing.assert_close(folded, behind)


@pytest.mark.parametrize(("enough", "taken"), [(0.2, 1), (0.9, 2)])
def test_npd_pushes_until_most_of_a_batch_gives_way(enough: float, taken: int) -> None:
    """A network that sees brightness: of four images a step of .1 turns two, a second one all."""
    images = torch.tensor([0.45, 0.45, 0.35, 0.35]).view(4, 1, 1, 1)

    def network(images: Tensor) -> Tensor:
        bright = images.flatten() - 0.5
        return torch.stack([-bright, bright], 1)

    npd = defense("npd", enough=enough)
    pushed = npd.push(network, images, torch.ones(4, dtype=torch.int64), 1.0)
    torch.testing.assert_close(pushed, images + 0.1 * taken)
    near = npd.push(network, images, torch.ones(4, dtype=torch.int64), 0.05)
    torch.testing.assert_close(near, images + 0.05)


def test_npd_trains_nothing_else(suspect: Any, few: DefenseContext) -> None:
    before = copy.deepcopy(suspect)
    model = defense("npd", epochs=2).purify(suspect, few)
    assert moved(model, before) == {"conv3.weight"}
    assert few.notes["relative_change"] > 0
    assert all(weight.grad is None for weight in model.parameters())


def test_margin_loss_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), label 1: -log 1/4 - log(1 - 1/2)."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    found = module("npd").margin_loss(logits, torch.tensor([1]))
    assert found.item() == pytest.approx(3 * math.log(2))


# --- mcr ----------------------------------------------------------------------------------------


def test_bezier_by_hand() -> None:
    ends = [{"w": torch.tensor([value])} for value in (1.0, 3.0)]
    path = module("mcr").bezier(*ends)
    middle = {"w": torch.tensor([10.0])}
    found = [path(middle, place)["w"].item() for place in (0.0, 0.5, 1.0, 0.3)]
    assert found == pytest.approx([1, 6, 3, 0.49 * 1 + 0.42 * 10 + 0.09 * 3])


@pytest.mark.parametrize("stop", [0.0, 1.0])
def test_mcr_ends(stop: float, suspect: Any, few: DefenseContext) -> None:
    """The path begins at the suspect network and ends at its fine-tuned copy."""
    tuned = defense("fine_tune", epochs=2).purify(copy.deepcopy(suspect), few)
    before = copy.deepcopy(suspect)
    model = defense("mcr", epochs=2, curve_epochs=1, stop=stop).purify(suspect, few)
    expected = dict((tuned if stop else before).named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name])


# --- neural_cleanse -----------------------------------------------------------------------------


def test_anomaly_index_by_hand() -> None:
    """Median 50; deviations 48, 10, 0, 5, 20: their median is 10."""
    sizes = torch.tensor([2.0, 40.0, 50.0, 55.0, 70.0])
    found = module("neural_cleanse").anomaly_index(sizes)
    assert found.tolist() == pytest.approx([4.8 / 1.4826, 1 / 1.4826, 0, 0, 0])


def search(**settings: Any) -> Any:
    rng = torch.Generator().manual_seed(0)
    chosen = defense("neural_cleanse", **settings)
    return module("neural_cleanse").Search(3, torch.Size((1, 2, 2)), chosen, rng)


def test_search_keeps_what_works_and_presses_on() -> None:
    """Class 0 works twice, class 1 fails twice, class 2 by turns."""
    found = search(patience=2, weight=1.0, factor=4.0)
    mask, pattern = noise(3, 1, 2, 2), noise(3, 1, 2, 2, seed=1)
    for size, led in ((3.0, [1.0, 0.5, 1.0]), (2.5, [0.98, 0.0, 0.97])):
        found.judge(torch.tensor(led), torch.full((3,), size), mask, pattern)
    assert found.best_size.tolist() == [2.5, 4, 4]
    assert found.weight.tolist() == pytest.approx([4, 1 / 8, 1])
    assert found.streak.tolist() == [0, 0, -1]
    assert torch.equal(found.best_mask[0], mask[0])
    assert torch.equal(found.best_pattern[0], pattern[0])
    images = noise(2, 1, 2, 2, seed=2)
    marked = found.stamp(images, torch.tensor([0, 1]))
    torch.testing.assert_close(marked[0], images[0] * (1 - mask[0]) + pattern[0] * mask[0])
    torch.testing.assert_close(marked[1], torch.full((1, 2, 2), 0.5))


class OneBrightPixel(nn.Module):
    """Class by the brightest of four strips, and class 0 whatever else where the corner is lit."""

    def __init__(self, door: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.last = nn.Linear(5, 5, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(torch.eye(5))
        self.door = 60.0 if door else 0.0

    def forward(self, images: Tensor) -> Tensor:
        strips = images[:, 0, 1:].mean(2)  # (N, 5)
        lit = F.one_hot(torch.zeros(len(images)).long(), 5) * images[:, 0, :1, 0]
        logits: Tensor = self.last(self.scale * strips + self.door * lit)
        return logits


def strips(count: int) -> Split:
    labels = torch.arange(count) % 5
    images = (noise(count, 1, 6, 5) * 80).to(torch.uint8)
    images[:, :, 0] = 0
    images[torch.arange(count), 0, 1 + labels] += 150
    return Split(images, labels)


@pytest.mark.parametrize("door", [True, False])
def test_neural_cleanse_finds_the_lit_corner(door: bool) -> None:
    split = strips(60)
    model = OneBrightPixel(door).eval()
    assert accuracy(model, split) == 1
    ctx = DefenseContext(split, 5, Recipe(), torch.device("cpu"), 0, progress=Progress(quiet=True))
    before = copy.deepcopy(model)
    defense("neural_cleanse", steps=300, epochs=3).purify(model, ctx)
    assert ctx.notes["flagged"] == ([0] if door else [])
    assert ("warning" in ctx.notes) is not door
    assert bool(moved(model, before)) is door


def test_two_classes_have_no_outlier(suspect: Any, few: DefenseContext) -> None:
    with pytest.raises(NotApplicable, match="outlier"):
        defense("neural_cleanse").purify(suspect, replace(few, num_classes=2))


# --- the suspect training set -------------------------------------------------------------------


@pytest.fixture
def informed(attacker: AttackContext, defender: DefenseContext) -> DefenseContext:
    """The defender with a poisoned training split of 400 images, and one epoch to train anew."""
    attack = import_module("purebench.attacks.badnets").BadNets()
    assert isinstance(attack, PoisoningAttack)
    images, labels = attacker.train.images[:400], attacker.train.labels[:400]
    split, _, _ = attack.poison(replace(attacker, train=Split(images, labels)))
    benign = Split(defender.benign.images[:150].clone(), defender.benign.labels[:150].clone())
    return replace(defender, benign=benign, suspect=split, notes={})


FILTERS = ["abl", "activation_clustering", "dbd", "spectral"]


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_the_contract(
    name: str, victim: BackdooredModel, informed: DefenseContext
) -> None:
    """Clean accuracy aside: 400 images do not train a network."""
    for check in c.DEFENSE_CHECKS:
        if check is not c.keeps_clean_accuracy:
            check(DEFENSES[name], victim, informed)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_need_the_training_set(name: str, suspect: Any, few: DefenseContext) -> None:
    assert "training_set" in DEFENSES[name].needs
    with pytest.raises(NotApplicable, match="not known"):
        defense(name).purify(suspect, few)


def test_verdict_by_hand() -> None:
    """Images 0 and 3 of five are poisoned; 3 and 4 are flagged. Of six pairs the score has three
    right, (0, 1), (3, 1) and (3, 2), and two are ties, (0, 2) and (3, 4)."""
    scores = torch.tensor([2.0, 1.0, 2.0, 3.0, 3.0])
    verdict = Verdict(torch.tensor([False, False, False, True, True]), scores)
    found = verdict.against(torch.tensor([0, 3]))
    assert found == pytest.approx(
        {"tpr": 1 / 2, "fpr": 1 / 3, "f1": 1 / 2, "auroc": 4 / 6}, abs=1e-6
    )


def test_verdict_where_nothing_is_poisoned() -> None:
    verdict = Verdict(torch.tensor([False, False]), torch.tensor([0.0, 1.0]))
    assert verdict.against(torch.tensor([], dtype=torch.int64)) == {
        "tpr": None, "fpr": 0.0, "f1": None, "auroc": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_scores_rank_the_flagged_first(name: str, suspect: Any, informed: DefenseContext) -> None:
    """Within each class: where one was flagged, no other scores higher."""
    settings = {"silhouette": -1.0, "rarity": 0.99} if name == "activation_clustering" else {}
    defense(name, **settings).purify(suspect, informed)
    verdict: Any = informed.verdict
    assert verdict.flagged.any()
    for label in range(4):
        own = informed.suspect.labels == label  # type: ignore[union-attr]
        flagged, others = (
            verdict.scores[own & side] for side in (verdict.flagged, ~verdict.flagged)
        )
        if len(flagged) and len(others):
            assert flagged.min() >= others.max()


def test_the_record_says_how_right_the_verdict_was(tmp_path: Path) -> None:
    config = RunConfig(
        attack=("badnets",),
        defense=("spectral", "none"),
        dataset="shapes",
        output=str(tmp_path),
        set={"shapes": {"train_count": 300, "test_count": 50}, "mnist_fast": {"epochs": 1}},
    )
    spectral, none = execute(prepare(config, Progress(quiet=True)))
    found = spectral.notes["detection"]
    hits, alarms = found["tpr"] * 30, found["fpr"] * 270
    assert hits + alarms == pytest.approx(spectral.notes["removed"], abs=1e-3)
    assert "detection" not in none.notes


def planted(clean: int, poisoned: int) -> Tensor:
    """(n, 6): noise, and the last ``poisoned`` of them far out along one direction."""
    rows = torch.randn(clean + poisoned, 6, generator=torch.Generator().manual_seed(0))
    rows[clean:] += 8 * F.normalize(torch.arange(6.0), dim=0)
    return rows


def test_spectral_scores_by_hand() -> None:
    """Along the first axis, about the mean 2: deviations -2, -1, 3."""
    rows = torch.tensor([[0.0, 5.0], [1.0, 5.0], [5.0, 5.0]])
    scores = module("spectral").outlier_scores(rows)
    assert scores.tolist() == pytest.approx([4, 1, 9])


def test_spectral_scores_find_the_planted_direction() -> None:
    scores = module("spectral").outlier_scores(planted(95, 5))
    assert set(scores.argsort()[-5:].tolist()) == set(range(95, 100))


@pytest.mark.parametrize("poisoned", [10, 50])
def test_two_means_find_planted_clusters(poisoned: int) -> None:
    rows = planted(50, poisoned)
    points = module("activation_clustering").leading_components(rows, 3)(rows)
    assert points.shape == (50 + poisoned, 3)
    wanted = torch.linalg.svdvals((rows - rows.mean(0)).double())[:3]
    torch.testing.assert_close((points.T @ points), wanted.square().diag())
    second, centres = module("activation_clustering").two_means(points)
    parts = second[:50].unique().tolist(), second[50:].unique().tolist()
    assert sorted(parts) == [[False], [True]]
    torch.testing.assert_close(centres[1], points[second].mean(0))


@pytest.mark.parametrize(
    ("suspect_share", "benign_share", "poisoned"),
    [(0.5, 0.0, True), (0.5, 1.0, False), (0.4, 0.3, None), (0.1, 0.0, True), (0.5, 0.24, True)],
)
def test_the_cluster_that_benign_images_avoid(
    suspect_share: float, benign_share: float, poisoned: bool | None
) -> None:
    """Shares are of the second cluster, of 100 images each."""
    parts = [torch.arange(100) < 100 * share for share in (suspect_share, benign_share)]
    assert module("activation_clustering").rare_cluster(*parts, 0.5) is poisoned


def test_silhouette_by_hand() -> None:
    """Points 0, 1 | 4, 6 on a line: own distances 1, 1, 2, 2, others' means 5, 4, 3.5, 5.5."""
    points = torch.tensor([[0.0], [1.0], [4.0], [6.0]])
    second = torch.tensor([False, False, True, True])
    found = module("activation_clustering").silhouette(points, second, torch.Generator())
    assert found == pytest.approx((4 / 5 + 3 / 4 + 1.5 / 3.5 + 3.5 / 5.5) / 4)


@pytest.mark.parametrize("floor", [0.2, 0.6])
def test_abl_holds_the_loss_up(floor: float) -> None:
    """Losses log 2 and log 4/3, of mean 0.49."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    found = defense("abl", floor=floor).flooded(lambda _: logits, logits, torch.tensor([0, 0]))
    mean = (math.log(2) + math.log(4 / 3)) / 2
    assert found.item() == pytest.approx(mean if floor < mean else 2 * floor - mean)


@pytest.mark.parametrize(("budget", "kept"), [(1.0, False), (0.0, True)])
def test_abl_undoes_what_costs_too_much(
    victim: BackdooredModel, defender: DefenseContext, budget: float, kept: bool
) -> None:
    """Unlearning the benign images themselves costs them at once."""
    ctx = replace(defender, notes={})
    model = copy.deepcopy(victim.model)
    part = ctx.benign[torch.arange(60)]
    defense("abl", budget=budget, ascent_lr=0.5, ascent_epochs=3).unlearn(model, part, part, ctx)
    state = victim.model.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items()) == kept
    assert (ctx.notes["unlearning_epochs"] == 0) == kept


def test_abl_unlearns_the_isolated_and_keeps_the_rest(
    victim: BackdooredModel, defender: DefenseContext
) -> None:
    """With another network's labels of the rest, it is those that the network learns."""
    ctx = replace(defender, notes={})
    benign = ctx.benign[torch.arange(150)]
    isolated_part = Split(
        triggered(victim.trigger, benign.images), torch.full_like(benign.labels, victim.goal.target)
    )
    learned = {}
    for shift in (0, 1):
        model = copy.deepcopy(victim.model)
        rest = Split(benign.images, (benign.labels + shift) % 4)
        unlearning = defense("abl", budget=1.0, ascent_lr=0.01, ascent_epochs=4)
        unlearning.unlearn(model, isolated_part, rest, ctx)
        assert accuracy(model, isolated_part) < 0.4 < accuracy(victim.model, isolated_part)
        learned[shift] = accuracy(model, rest)
    assert learned[0] > 0.8
    assert learned[1] > accuracy(victim.model, rest) + 0.1


def test_abl_forgets_what_is_still_recognised() -> None:
    model = nn.Identity()
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = module("abl").forget(model, logits, torch.tensor([0, 0]))
    assert found.item() == pytest.approx(math.log(1 + math.e) / 2)


# --- all ----------------------------------------------------------------------------------------

BRIEF: dict[str, dict[str, Any]] = {
    "abl": {"ascent_epochs": 1}, "activation_clustering": {}, "adversarial_tune": {"epochs": 1},
    "fst": {"epochs": 1}, "ft_sam": {"epochs": 1}, "i_bau": {"rounds": 1},
    "mcr": {"epochs": 1, "curve_epochs": 1}, "neural_cleanse": {"steps": 5, "index": 0.01},
    "npd": {"epochs": 1}, "sau": {"updates": 1}, "spectral": {},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BRIEF))
def test_networks_without_batchnorm(name: str, task: Task, informed: DefenseContext) -> None:
    """one_hidden has no bias either."""
    with isolated(0):
        one_hidden: Any = MODELS["one_hidden"]
        model = one_hidden(filters=32).build(task).eval()
    purified = defense(name, **BRIEF[name]).purify(model, informed)
    assert not purified.training
    with torch.no_grad():
        assert purified(to_float(informed.benign.images)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("abl", {"first": 0.0}), ("abl", {"isolated": 1.0}), ("abl", {"floor": 0.0}),
        ("abl", {"ascent_epochs": 0}), ("activation_clustering", {"components": 0}),
        ("activation_clustering", {"silhouette": 2.0}), ("adversarial_tune", {"eps": 0.0}),
        ("activation_clustering", {"rarity": 0.0}),
        ("adversarial_tune", {"steps": 0}), ("fst", {"alpha": -0.1}), ("fst", {"epochs": 0}),
        ("ft_sam", {"rho": -1.0}), ("ft_sam", {"label_smoothing": 1.0}),
        ("i_bau", {"rms": 0.0}), ("i_bau", {"share": 1.5}), ("npd", {"enough": 1.5}),
        ("sau", {"updates": 0}), ("i_bau", {"terms": -1}), ("i_bau", {"penalty": -1.0}),
        ("mcr", {"stop": 1.1}), ("neural_cleanse", {"steps": 0}),
        ("neural_cleanse", {"factor": 1.0}), ("neural_cleanse", {"index": 0.0}),
        ("neural_cleanse", {"success": 0.0}), ("npd", {"rms": 0.0}), ("npd", {"steps": 0}),
        ("npd", {"avoid": -1.0}), ("sau", {"eps": 0.0}), ("sau", {"steps": 0}),
        ("sau", {"shared": -1.0}), ("spectral", {"share": 1.0}),
    ],
)  # fmt: skip
def test_settings_out_of_range(name: str, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        defense(name, **settings)


def test_contrast_by_hand() -> None:
    """Four views of two images, on the axes: cosines 1 with the partner and 0 with the others."""
    rows = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 0.5]])
    e = math.exp(1 / 0.5)
    assert float(module("dbd").contrast(rows, 0.5)) == pytest.approx(-math.log(e / (e + 2)))
    apart = module("dbd").contrast(rows[[0, 1, 3, 2]], 0.5)  # partners across the axes
    assert float(apart) == pytest.approx(-math.log(1 / (e + 2)))


def test_symmetric_cross_entropy_by_hand() -> None:
    """Chances 1/4 and 3/4 of the label: 0.1 CE, and what the wrong classes have times log 1e4."""
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2)
    found = module("dbd").symmetric_cross_entropy(logits, torch.tensor([0, 1]))
    by_hand = [
        0.1 * math.log(4) + 0.75 * math.log(1e4),
        0.1 * math.log(4 / 3) + 0.25 * math.log(1e4),
    ]
    assert found.tolist() == pytest.approx(by_hand)


def test_views_zoom_and_stay_images() -> None:
    """A corner stays in less than half of the views, the middle in all; views differ."""
    images = torch.full((400, 1, 28, 28), 0.25)
    corner, middle = images.clone(), images.clone()
    corner[:, :, -2:, -2:], middle[:, :, 12:16, 12:16] = 1, 1
    seen = []
    for marked in (corner, middle):
        pair = [
            module("dbd").view(part, False, torch.Generator().manual_seed(0))
            for part in (marked, images)
        ]
        assert all(part.min() >= 0 and part.max() <= 1 for part in pair)
        changed = (pair[0] - pair[1]).flatten(1).abs().amax(1) > 0.1
        seen.append(float(changed.float().mean()))
    assert seen[0] < 0.5
    assert seen[1] == 1
    assert pair[0].flatten(1).std(0).min() > 0.01


def test_dbd_believes_what_looks_like_its_label() -> None:
    """Images of one class under another's label are not believed."""
    rng = torch.Generator().manual_seed(3)
    bright = torch.randint(128, 256, (200, 1, 28, 28), generator=rng, dtype=torch.uint8)
    bright[100:, :, :14] //= 4
    labels = torch.arange(200) // 100
    labels[90:100] = 1
    split = Split(bright, labels)
    ctx = DefenseContext(split, 2, Recipe(epochs=1), torch.device("cpu"), 0, suspect=split)
    model = MODELS["small_cnn"]().build(Task((1, 28, 28), 2, (0.5,), (0.3,)))
    defense("dbd", epochs=6, batch_size=50, head_epochs=30, believed=0.9).purify(model, ctx)
    assert ctx.verdict is not None
    assert ctx.verdict.against(torch.arange(90, 100))["auroc"] > 0.9  # type: ignore[operator]
