"""The defenses that find and silence neurons: their mathematics by hand, and every network."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purebench import (
    DEFENSES,
    MODELS,
    BackdooredModel,
    DataBundle,
    DefenseContext,
    Goal,
    NotApplicable,
    Recipe,
    Split,
    Task,
    runner,
)
from purebench.contract import DEFENSE_CHECKS
from purebench.data import to_float
from purebench.evaluate import Judge, accuracy
from purebench.progress import Progress
from purebench.scores import Scores
from purebench.seeding import isolated


def sibling(name: str) -> Any:
    return import_module(f"purebench.defenses.{name}")


anp, attention, bnp, channels = map(sibling, ("anp", "_attention", "bnp", "_channels"))
clp, ep, masks, nad = map(sibling, ("clp", "ep", "_masks", "nad"))
sharpness, tsbd, unlearning, watch = map(sibling, ("_sharpness", "tsbd", "_unlearn", "_watch"))

# Settings under which each is quick; the others are as they come.
QUICK: dict[str, dict[str, Any]] = {
    "anp": {"steps": 1},
    "anp_oracle": {"steps": 1},
    "bnp": {},
    "clp": {},
    "ep": {},
    "nad": {"epochs": 1, "teacher_epochs": 1},
    "rnp": {"unlearn_steps": 1, "recover_steps": 1},
    "tsbd": {"unlearn_steps": 1, "epochs": 1, "shares": (0.1,)},
}


def pixels(*values: int) -> Split:
    """One image a value, labelled by its brightness."""
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Split(images, (images.flatten() > 100).long())


def holding(split: Split, **more: Any) -> DefenseContext:
    classes = int(split.labels.max()) + 1
    recipe = Recipe(epochs=1, batch_size=16, lr=0.05)
    quiet = Progress(quiet=True)
    device = torch.device("cpu")
    return DefenseContext(split, classes, recipe, device, 0, progress=quiet, **more)


def judging(split: Split) -> Callable[[nn.Module], Scores]:
    """Of a trigger that does nothing."""
    return Judge(split, nn.Identity(), Goal(2, target=0)).score


@cache
def _built(name: str) -> nn.Module:
    with isolated(0):
        model = MODELS[name]().build(Task((1, NETWORKS[name], NETWORKS[name]), 2, (0.5,), (0.25,)))
    return narrow(model) if name in WIDE else model


def narrow(model: nn.Module) -> nn.Module:
    """A quarter of the channels, in place: a sixteenth of the weights, and the same structure."""

    def quarter(size: int) -> int:
        return size // 4 if size >= 64 else size  # kernels, classes and image channels stay

    for module in model.modules():
        for name in ("in_channels", "out_channels", "num_features", "in_features"):
            if hasattr(module, name):
                setattr(module, name, quarter(getattr(module, name)))
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data[tuple(slice(quarter(size)) for size in tensor.shape)].clone()
    return model


def network(name: str) -> nn.Module:
    """Of the suite, untrained, for two classes of grey images of NETWORKS[name] pixels a side; a
    quarter as wide where it is WIDE."""
    return copy.deepcopy(_built(name)).eval()


def noise_images(count: int, side: int) -> Split:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, side, side), generator=rng).to(torch.uint8)
    return Split(images, torch.arange(count) % 2)


# --- every network ------------------------------------------------------------------------------

NETWORKS = {
    "lenet": 16,
    "one_hidden": 8,
    "preact_resnet18": 16,
    "resnet18": 16,
    "small_cnn": 16,
    "vgg11_bn": 32,
}
WIDE = {"preact_resnet18", "resnet18", "vgg11_bn"}
REFUSED = {
    ("bnp", "lenet"): "no BatchNorm",
    ("bnp", "one_hidden"): "no BatchNorm",
    ("nad", "one_hidden"): "more than one position",
}


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("name", QUICK)
def test_every_network_is_repaired_or_refused(name: str, model: str) -> None:
    split = noise_images(6, NETWORKS[model])
    ctx = holding(split, suspect=split, oracle=judging(split))
    suspect = network(model)
    defense = DEFENSES[name](**QUICK[name])
    if (name, model) in REFUSED:
        with pytest.raises(NotApplicable, match=REFUSED[name, model]):
            defense.purify(suspect, ctx)
        return
    purified = defense.purify(suspect, ctx)
    assert not any(module.training for module in purified.modules())
    assert purified(to_float(split.images)).isfinite().all()
    assert ctx.notes


def test_every_model_of_the_suite_is_in_the_table() -> None:
    assert set(NETWORKS) == set(MODELS.names())


@pytest.mark.parametrize("name", QUICK)
def test_networks_without_channels_are_refused(name: str) -> None:
    split = noise_images(8, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(NotApplicable):
        DEFENSES[name](**QUICK[name]).purify(
            model, holding(split, suspect=split, oracle=judging(split))
        )


@pytest.mark.parametrize("name", ["ep", "anp_oracle"])
def test_what_is_needed_is_given(
    name: str, victim: BackdooredModel, defender: DefenseContext, bundle: DataBundle
) -> None:
    """The suite's contract test gives neither a suspect training set nor an oracle, and skips."""
    with pytest.raises(NotApplicable, match="not given"):
        DEFENSES[name]().purify(copy.deepcopy(victim.model), defender)
    few = defender.benign[torch.arange(60)]
    judge = Judge(few, victim.trigger, victim.goal)
    given = replace(defender, benign=few, suspect=bundle.train, oracle=judge.score)
    quick = [(setting, type(value), value) for setting, value in QUICK[name].items()]
    cls = dataclasses.make_dataclass("Quick", quick, bases=(DEFENSES[name],), frozen=True)
    for check in DEFENSE_CHECKS:
        check(cls, victim, given)


# --- channels -----------------------------------------------------------------------------------


def test_outliers_by_hand() -> None:
    """Ten zeros and a one: mean 1/11, sample deviation sqrt(1/11); the one deviates by 10 times
    its mean over that, 10 / sqrt(11) = 3.02."""
    values = torch.zeros(11)
    values[4] = 1
    assert channels.outliers(values, 3.01).tolist() == [4]
    assert channels.outliers(values, 3.02).tolist() == []
    assert channels.outliers(values[2:], 2.7).tolist() == []  # nine: 8 / 3


def test_clp_bound_by_hand() -> None:
    """Two inputs, a 1x2 kernel: [[3, 0], [4, 0]] has the singular value 5, the norm doubles it."""
    conv = nn.Conv2d(2, 3, (1, 2), bias=False)
    norm = nn.BatchNorm2d(3, eps=0.25).eval()
    state = torch.tensor([[[3.0, 0], [4, 0]], [[1, 0], [0, 2]], [[1, 1], [1, 1]]])
    conv.load_state_dict({"weight": state.view(3, 2, 1, 2)})
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1, 0]))
    norm.running_var = torch.tensor([0.75, 0, 1])
    plain = clp.lipschitz_bounds(channels.Channels("conv", conv, None))
    assert plain.tolist() == pytest.approx([5, 2, 2])
    bounds = clp.lipschitz_bounds(channels.Channels("conv", conv, norm))
    assert bounds.tolist() == pytest.approx([10, 4, 0])


def test_clp_bound_is_a_singular_value() -> None:
    conv = nn.Conv2d(3, 4, 3)
    expected = [torch.linalg.svdvals(weight.flatten(1))[0].item() for weight in conv.weight]
    bounds = clp.lipschitz_bounds(channels.Channels("conv", conv, None))
    assert bounds.tolist() == pytest.approx(expected, rel=1e-5)


def test_clp_silences_the_planted_channel() -> None:
    model: Any = network("small_cnn")
    with torch.no_grad():
        model.conv2.weight[7] *= 50
    ctx = holding(noise_images(4, 16))
    DEFENSES["clp"]().purify(model, ctx)
    assert ctx.notes["pruned"]["conv2"] == [7]
    assert not model.norm2.weight[7]
    assert not model.conv2.weight[7].any()


def test_clp_pairs_a_pre_activation_block_by_its_data() -> None:
    """conv1's outlier is silenced in the norm that takes it, norm2; conv2, whose output is added
    first, is bounded by its weight alone."""
    model: Any = network("preact_resnet18")
    block = model.stage1[0]
    with torch.no_grad():
        block.norm2.weight[5] = 100
        block.conv2.weight[9] *= 100
        model.stage1[1].norm1.weight[11] = 100  # behind the sum: no convolution's own
    ctx = holding(noise_images(4, 16))
    DEFENSES["clp"]().purify(model, ctx)
    assert ctx.notes["pruned"]["stage1.0.conv1"] == [5]
    assert ctx.notes["pruned"]["stage1.0.conv2"] == [9]
    assert not block.norm2.weight[5]
    assert model.stage1[1].norm1.weight[11] == 100


# --- masks --------------------------------------------------------------------------------------


def double_masks(norm: bool) -> tuple[Any, Tensor, Tensor]:
    """Masks of a small network in double precision, images and labels."""
    with isolated(1):
        layers: list[nn.Module] = [nn.Conv2d(1, 3, 2)]
        if norm:
            layers.append(nn.BatchNorm2d(3))
            nn.init.normal_(layers[-1].bias)  # type: ignore[arg-type]
        layers += [nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)]
        model = nn.Sequential(*layers).double()
        images, labels = torch.rand(6, 1, 3, 3).double(), torch.arange(6) % 2
    return masks.Masks(model), images, labels


@pytest.mark.parametrize("norm", [True, False])
def test_anp_gradient_against_finite_differences(norm: bool) -> None:
    found, images, labels = double_masks(norm)
    noise = torch.linspace(-0.3, 0.4, 6, dtype=torch.float64).view(2, 3)

    def loss(values: Tensor) -> Tensor:
        found.values = values
        value: Tensor = anp.mask_loss(found, images, labels, noise, alpha=0.2)
        return value

    start = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(start), start)
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    differences = [(loss(start + by) - loss(start - by)).item() / 2e-6 for by in step]
    assert gradient.tolist() == pytest.approx(differences, rel=1e-6, abs=1e-9)
    assert gradient.abs().min() > 1e-5


@pytest.mark.parametrize("norm", [True, False])
def test_masks_scale_weights_and_leave_biases(norm: bool) -> None:
    found, images, _ = double_masks(norm)
    found.model.eval()
    by_hand = copy.deepcopy(found.model)
    site = by_hand[1] if norm else by_hand[0]
    scale = torch.tensor([0.0, 0.5, 2], dtype=torch.float64)
    with torch.no_grad():
        site.bias.copy_(torch.tensor([1.0, 2, 3]))
        site.weight *= scale.view(-1, *[1] * (site.weight.ndim - 1))
        (found.model[1] if norm else found.model[0]).bias.copy_(site.bias)
        found = masks.Masks(found.model)
        assert torch.allclose(found.logits(images, scale), by_hand(images))
        site.bias *= scale
        assert torch.allclose(found.logits(images, scale, scale), by_hand(images))


def test_masks_move_no_running_statistics() -> None:
    found, images, labels = double_masks(norm=True)
    before = copy.deepcopy(found.model.state_dict())
    found.model.train()
    anp.mask_loss(found, images, labels, torch.zeros(2, 3).double(), 0.5).backward()
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())
    assert all(weight.grad is None for weight in found.model.parameters())


def test_anp_perturbs_uphill_and_within_eps() -> None:
    found, images, labels = double_masks(norm=True)
    start = torch.full((2, 3), 0.05, dtype=torch.float64)
    settings: Any = DEFENSES["anp"](eps=0.1)  # type: ignore[call-arg]
    noise = anp.worst_noise(found, images, labels, start, settings)
    assert noise.abs().max() <= 0.1 + 1e-12
    assert set(noise.flatten().tolist()) == {0.1, -0.05}  # one step of 0.1, up or down, clipped
    before, after = (
        anp.mask_loss(found, images, labels, value, 0.0).item() for value in (start, noise)
    )
    assert after > before


def test_pruning_by_threshold() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten()).eval()
    with torch.no_grad():
        model[0].bias.fill_(0.5)
    found = masks.below({"0": torch.tensor([0.2, 0.21, 0.0])}, 0.2)
    assert masks.prune(model, found) == {"0": [0, 2]}
    assert model[0].weight.flatten().abs().gt(0).tolist() == [False, True, False]
    assert model[0].bias.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("budget", "threshold", "pruned"), [(0.0, 0.45, [1]), (0.5, 0.95, [0, 1]), (-0.1, None, [])]
)
def test_pruning_stays_within_the_budget(
    budget: float, threshold: float | None, pruned: list[int]
) -> None:
    """Channel 0 tells bright from dark; channel 1 nothing."""
    model: Any = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[0.0, 0], [10, 0]]))
        model[2].bias.copy_(torch.tensor([0.0, -4]))
    values = {"0": torch.tensor([0.5, 0.1])}
    split = pixels(51, 153, 40, 160)
    notes = masks.prune_masked(model, values, split, budget)
    assert (notes["threshold"], notes["pruned"]["0"]) == (threshold, pruned)
    assert accuracy(model, split) == notes["validation_accuracy"] == (0.5 if 0 in pruned else 1)


def test_anp_with_a_fixed_threshold(victim: BackdooredModel, defender: DefenseContext) -> None:
    ctx = replace(defender, notes={})
    fixed: Any = DEFENSES["anp"]
    model: Any = fixed(threshold=0.99, steps=1).purify(copy.deepcopy(victim.model), ctx)
    assert ctx.notes["threshold_from"] == "fixed"
    for name, found in ctx.notes["pruned"].items():
        dead = model.get_submodule(name).weight == 0
        assert torch.nonzero(dead).flatten().tolist() == found
    assert any(ctx.notes["pruned"].values())


# --- the oracle ---------------------------------------------------------------------------------


def scored(acc: int, asr: int) -> Scores:
    """In per cent."""
    return Scores(acc, 100, asr, 0, 100, 50, 0)


@pytest.mark.parametrize(("tolerance", "threshold"), [(0.1, 0.3), (0.5, 0.7), (0.0, 0.0)])
def test_the_oracle_chooses_by_what_it_is_told(
    tolerance: float, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five channels with masks 0.1, 0.3, ... 0.9; the oracle is told how many are pruned."""
    model: Any = nn.Sequential(nn.Conv2d(1, 5, 1), nn.Flatten(), nn.Linear(5, 2)).eval()
    values = {"0": torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])}
    monkeypatch.setattr(anp.ANP, "learn_masks", lambda *_: values)
    told = [scored(90, 100), scored(88, 50), scored(85, 20), scored(60, 30), scored(50, 10)]
    told.append(scored(10, 0))

    def oracle(candidate: Any) -> Scores:
        return told[int((candidate[0].weight.flatten() == 0).sum())]

    ctx = holding(pixels(51, 153), oracle=oracle)
    peeking: Any = DEFENSES["anp_oracle"]
    purified = peeking(tolerance=tolerance).purify(model, ctx)
    assert ctx.notes["threshold"] == threshold
    assert ctx.notes["pruned"]["0"] == torch.nonzero(values["0"] <= threshold).flatten().tolist()
    assert oracle(purified) == told[len(ctx.notes["pruned"]["0"])]


def test_only_what_is_called_an_oracle_is_given_one() -> None:
    split = noise_images(4, 4)
    judge = Judge(split, nn.Identity(), Goal(2, target=0))
    ctx = holding(split)
    plan = SimpleNamespace(
        source=SimpleNamespace(num_classes=2), recipe=ctx.recipe, device=ctx.device,
        progress=ctx.progress,
    )  # fmt: skip
    victim: Any = SimpleNamespace(plan=plan, benign=split, seed=0, judge=judge)
    peeking = type("Peeking", (DEFENSES["anp_oracle"],), {"name": "peeking"})
    named, other, misnamed = (
        runner.Victim.defender(victim, cls()).oracle
        for cls in (DEFENSES["anp_oracle"], DEFENSES["anp"], peeking)
    )
    assert named == judge.score
    assert other is misnamed is None


def test_an_oracle_runs_where_it_is_named() -> None:
    everything = runner._chosen(DEFENSES, ["all"])
    assert "anp" in everything
    assert "anp_oracle" not in everything
    assert "anp_oracle" not in runner._quick_defenses()
    assert "anp_oracle" in runner._chosen(DEFENSES, ["all", "anp_oracle"])
    assert runner._chosen(DEFENSES, ["anp_oracle"]) == ["anp_oracle"]


# --- unlearning ---------------------------------------------------------------------------------


def unlearnt(model: nn.Module, split: Split, **given: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"floor": 0.3, "steps": 200, "clip": 20.0, "seed": 0, **given}
    recipe = Recipe(batch_size=64, lr=0.01, weight_decay=0)
    quiet = Progress(quiet=True)
    facts: dict[str, Any] = unlearning.unlearn(
        model, split, split, recipe, progress=quiet, **settings
    )
    return facts


def test_unlearning_stops_at_the_floor(victim: BackdooredModel, defender: DefenseContext) -> None:
    split = defender.benign[torch.arange(150)]
    model = copy.deepcopy(victim.model)
    facts = unlearnt(model, split)
    assert facts["unlearnt_accuracy"] == pytest.approx(accuracy(model, split), abs=1e-6)
    assert facts["unlearnt_accuracy"] <= 0.3
    assert 0 < facts["unlearning_steps"] < 200
    again = copy.deepcopy(victim.model)
    unlearnt(again, split, steps=facts["unlearning_steps"] - 1)
    assert accuracy(again, split) > 0.3  # it was the first step that got there
    assert unlearnt(model, split)["unlearning_steps"] == 0


def test_unlearning_steps_are_clipped() -> None:
    """One step of lr 0.01 with a gradient of norm 0.001 at most moves by 0.00001."""
    with isolated(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    before = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    unlearnt(model, pixels(50, 150), floor=-1.0, steps=1, clip=0.001)
    after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-5, rel=1e-2)


# --- tsbd ---------------------------------------------------------------------------------------


def test_reset_by_hand() -> None:
    """Channels of summed change 1, 6, 3, 10 in two layers: half of them are the second and the
    fourth; of their four weights that changed by 5, 1, 4, 6 half are the first and the last."""
    model: Any = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1)
    changes = {
        "0": torch.tensor([[0.5, 0.5], [5, 1]]),
        "1": torch.tensor([[0.0, 3], [4, 6]]),
    }
    assert tsbd.reset(model, changes, share=0.5, m=0.5) == {"0": [1], "1": [1]}
    assert model[0].weight.flatten().tolist() == [1, 1, 0, 1]
    assert model[1].weight.flatten().tolist() == [1, 1, 1, 0]


def test_tsbd_ranks_the_planted_neuron_first(
    victim: BackdooredModel, defender: DefenseContext
) -> None:
    """Unlearning moves a channel's weights through what reads it: the channel that the head
    hangs on goes farthest."""
    model: Any = copy.deepcopy(victim.model)
    with torch.no_grad():
        model.head.weight.view(4, 80, -1)[:, 33] *= 30
    split = defender.benign[torch.arange(150)]
    ctx = replace(defender, benign=split, notes={})
    defense: Any = DEFENSES["tsbd"](unlearn_steps=3)  # type: ignore[call-arg]
    changes = defense.unlearning_changes(model, split, split, ctx)
    assert int(changes["conv3"].sum(1).argmax()) == 33


def test_tsbd_affords_what_benign_images_bring_back(
    victim: BackdooredModel, defender: DefenseContext
) -> None:
    split = defender.benign[torch.arange(150)]
    changes = {"conv3": torch.rand(80, 360, generator=torch.Generator().manual_seed(0))}

    def share(budget: float) -> Any:
        ctx = replace(defender, benign=split, notes={})
        settings: dict[str, Any] = {"shares": (0.05, 1.0), "m": 1.0, "epochs": 1, "lr": 1e-6}
        defense: Any = DEFENSES["tsbd"](**settings | {"budget": budget})
        return defense.affordable_share(victim.model, changes, split, split, ctx)

    assert share(budget=0.3) == 0.05  # without the third block nothing is left
    assert share(budget=1.0) == 1.0


def test_gradient_norm_penalty_by_hand() -> None:
    """The gradient that backward leaves is the mixture of two, the second one step uphill."""
    radius, share = 0.5, 0.7
    with isolated(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
        images, labels = torch.rand(5, 1, 2, 2).double(), torch.tensor([0, 1, 2, 1, 0])

    def gradient(of: nn.Module) -> Tensor:
        parts = torch.autograd.grad(F.cross_entropy(of(images), labels), list(of.parameters()))
        return torch.cat([part.flatten() for part in parts])

    here = gradient(model)
    uphill = copy.deepcopy(model)
    moved = nn.utils.parameters_to_vector(uphill.parameters()) + radius * here / here.norm()
    nn.utils.vector_to_parameters(moved.detach(), uphill.parameters())
    expected = (1 - share) * here + share * gradient(uphill)
    sharpness.gradient_norm_penalised(radius, share)(model, images, labels).backward()
    left = torch.cat([weight.grad.flatten() for weight in model.parameters()])  # type: ignore[union-attr]
    assert torch.allclose(left, expected, rtol=1e-10)
    assert not torch.allclose(left, here, rtol=1e-2)


# --- attention ----------------------------------------------------------------------------------


def test_attention_map_by_hand() -> None:
    """Two channels, two positions: squares sum to 9 + 16 and 0, then to 0 and 4."""
    features = torch.tensor([[[[3.0, 0]], [[-4, 0]]], [[[0, 0]], [[0, 2]]]])
    assert attention.attention_map(features, 2.0).tolist() == [[1, 0], [0, 1]]
    assert attention.attention_map(features, 1.0).tolist() == [[1, 0], [0, 1]]
    both = torch.tensor([[[[3.0, 0]], [[0, 2]]]])  # 9 and 4
    length = math.hypot(9, 4)
    assert attention.attention_map(both, 2.0)[0].tolist() == pytest.approx([9 / length, 4 / length])
    distance = attention.attention_distance(both, features[:1], 2.0)
    by_hand = (1 - 9 / length) ** 2 + (4 / length) ** 2
    assert float(distance) == pytest.approx(by_hand)
    several = attention.attention_distance(
        both.repeat(3, 1, 1, 1), features[:1].repeat(3, 1, 1, 1), 2.0
    )
    assert float(several) == pytest.approx(by_hand)


STAGES = {
    "lenet": ["relu1", "pool1", "relu2", "pool2"],
    "one_hidden": [],
    "preact_resnet18": ["stage2.0.relu1", "stage3.0.relu1", "stage4.0.relu1", "stage4"],
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "small_cnn": ["relu1", "relu2", "relu3"],
    "vgg11_bn": ["features.2", "features.6", "features.13", "features.20", "features.27"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_end_where_the_map_shrinks(name: str) -> None:
    model = network(name)
    found = attention.stages(model, noise_images(2, NETWORKS[name]).images)
    assert found == STAGES[name]


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "preact_resnet18", "vgg11_bn", "lenet"])
def test_every_attention_term_is_alive(name: str) -> None:
    """Taken behind global pooling, a term would have no gradient."""
    side = NETWORKS[name]
    model, teacher = network(name), network(name)
    with torch.no_grad(), isolated(2):
        for weight in teacher.parameters():
            weight.add_(0.1 * weight.abs().mean() * torch.randn_like(weight))
    images = to_float(noise_images(3, side).images)
    names = attention.stages(model, noise_images(2, side).images)[-3:]
    assert len(names) == 3
    wanted, given = (nad.features(of, names, images)[0] for of in (teacher, model))
    first = next(weight for weight in model.parameters() if weight.ndim == 4)
    for mine, his in zip(given, wanted, strict=True):
        distance = attention.attention_distance(mine, his.detach(), 2.0)
        (gradient,) = torch.autograd.grad(distance, first, retain_graph=True)
        assert gradient.abs().max() > 0


def test_attending_adds_the_terms() -> None:
    model, teacher = network("small_cnn"), network("small_cnn")
    with torch.no_grad():
        teacher.get_submodule("conv1").weight[0] *= 3  # type: ignore[index,operator]
    split = noise_images(4, 16)
    images, names = to_float(split.images), ["relu1", "relu3"]
    loss = nad.attending(teacher, names, (5.0, 7.0), 2.0)(model, images, split.labels)
    (mine, logits), (his, _) = (nad.features(of, names, images) for of in (model, teacher))
    terms = [attention.attention_distance(a, b, 2.0) for a, b in zip(mine, his, strict=True)]
    expected = F.cross_entropy(logits, split.labels) + 5 * terms[0] + 7 * terms[1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(term > 0 for term in terms)


def test_watching_removes_its_hooks_after_an_error() -> None:
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(RuntimeError), watch.watching([model[0]]):
        raise RuntimeError
    assert not model[0]._forward_hooks


# --- distributions ------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    """Of N(1, 4) from N(3, 16): log 2 + (4 + 4) / 32 - 1/2."""
    of = torch.tensor([[1.0, 4], [3, 16], [5, 0]]).double()
    found = bnp.divergence(*of.T, *torch.tensor([[3.0, 16], [3, 16], [5, 0]]).double().T)
    assert found.tolist() == pytest.approx([math.log(2) - 0.25, 0, 0])


def test_moments_by_hand() -> None:
    """The norm meets 1, 2, 3, 6 over two images of two positions; in channel 1 twice that."""
    conv: Any = nn.Conv2d(1, 2, 1, bias=False)
    conv.weight.data = torch.tensor([255.0, 510]).view(2, 1, 1, 1)
    model = nn.Sequential(conv, nn.BatchNorm2d(2)).eval()
    images = torch.tensor([[1, 2], [3, 6]], dtype=torch.uint8).view(2, 1, 1, 2)
    ((mean, variance),) = bnp.moments(model, [model[1]], images).values()
    assert mean.tolist() == pytest.approx([3, 6])
    assert variance.tolist() == pytest.approx([3.5, 14])


def test_bnp_prunes_the_channel_that_is_reached_otherwise() -> None:
    model: Any = network("small_cnn")
    split = noise_images(300, 16)
    norms = [model.norm1, model.norm2, model.norm3]
    for norm in norms:  # as if trained on these images
        mean, variance = bnp.moments(model, [norm], split.images)[norm]
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    bias = model.norm2.bias.clone()
    model.norm2.running_mean[13] += 5 * model.norm2.running_var[13].sqrt()
    ctx = holding(split)
    DEFENSES["bnp"]().purify(model, ctx)
    assert ctx.notes["pruned"]["norm2"] == [13]
    assert torch.nonzero(model.norm2.weight == 0).flatten().tolist() == [13]
    assert torch.equal(model.norm2.bias, bias)


def test_entropy_by_hand() -> None:
    """Shares 1/2, 1/4, 1/4 of three bins, whatever the scale; constant channels have none."""
    values = torch.tensor([0.0, 0, 1, 2])
    expected = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert float(ep.entropy(values, 0.01)) == pytest.approx(expected)
    assert float(ep.entropy(1000 * values - 7, 0.01)) == pytest.approx(expected)
    assert float(ep.entropy(values, 100.0)) == pytest.approx(0)
    assert math.isnan(float(ep.entropy(torch.ones(4), 0.01)))


def test_ep_prunes_the_channel_with_two_heaps() -> None:
    """Eleven channels see noise; one sees a mark that a tenth of the images carry."""
    split = noise_images(400, 4)
    split.images[:, :, 0, 0] = 0
    split.images[::10, :, 0, 0] = 255
    model: Any = nn.Sequential(nn.Conv2d(1, 12, 4), nn.Flatten(), nn.Linear(12, 2)).eval()
    with torch.no_grad(), isolated(0):
        nn.init.normal_(model[0].weight)
        model[0].weight[:, :, 0, 0] = 0
        model[0].weight[5] *= 0.01
        model[0].weight[5, 0, 0, 0] = 1
    ctx = holding(split, suspect=split)
    DEFENSES["ep"]().purify(model, ctx)
    assert ctx.notes["pruned"] == {"0": [5]}


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clp", {"u": 0.0}), ("bnp", {"u": -1.0}), ("ep", {"u": 0.0}), ("ep", {"width": 0.0}),
        ("anp", {"eps": 0.0}), ("anp", {"steps": 0}), ("anp", {"alpha": 1.1}),
        ("anp", {"threshold": 1.0}), ("anp", {"lr": 0.0}), ("anp", {"ascents": 0}),
        ("rnp", {"floor": 1.1}), ("rnp", {"budget": -0.1}), ("rnp", {"holdout": 0.0}),
        ("anp", {"budget": -0.1}), ("anp", {"holdout": 1.0}), ("rnp", {"alpha": 0.0}),
        ("rnp", {"recover_steps": 0}), ("tsbd", {"m": 0.0}), ("tsbd", {"shares": (0.0, 0.5)}),
        ("tsbd", {"shares": ()}), ("tsbd", {"penalty": 1.5}), ("tsbd", {"radius": 0.0}),
        ("tsbd", {"epochs": 0}), ("tsbd", {"holdout": 1.0}), ("nad", {"betas": ()}),
        ("nad", {"betas": (-1.0,)}), ("nad", {"power": 0.0}), ("nad", {"epochs": 0}),
    ],
)  # fmt: skip
def test_settings_out_of_range(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DEFENSES[name](**settings)
