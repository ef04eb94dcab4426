"""Exact recovery undoes sparse errors in a one-hidden-layer network, and says when it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from purebench import DATASETS, LoadContext
from purebench.recovery.exact import (
    NOISES,
    TwoStage,
    accuracy,
    contaminate,
    filter_design,
    hidden_features,
    image_patches,
    output_design,
    recover_output,
    recover_weights,
    span_residual,
    train_two_stage,
)

torch.set_num_threads(1)
LAWS = [*NOISES, "dropout"]
PATCHES = torch.randn(8, 3, 240, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(patches: Tensor = PATCHES, outputs: int = 1, width: int = 200, **how: Any) -> TwoStage:
    """Random targets: recovery must not depend on what was learnt."""
    targets = torch.randn(len(patches), outputs, generator=rng(2), dtype=torch.float64)
    how = {"steps": 60, "output_steps": 60, "learning_rate": 0.003, **how}
    return train_two_stage(patches, targets, width=width, generator=rng(3), **how)


@pytest.fixture(scope="module")
def trained() -> TwoStage:
    return train()


@pytest.fixture(scope="module")
def mnist_images() -> Tensor:
    """The first digits, (100, 1, 28, 28) in [0, 1]."""
    source = DATASETS["mnist"]().load(LoadContext(Path("unused"), offline=True))
    return source.train.images[:100].double() / 255


def test_patches_tile_the_image() -> None:
    image = torch.arange(32.0).view(1, 2, 4, 4)
    patches = image_patches(image, 2)
    assert patches.shape == (1, 4, 8)
    assert patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    with pytest.raises(ValueError, match="do not tile"):
        image_patches(image, 3)
    with pytest.raises(ValueError, match="expected float images"):
        image_patches(image.byte(), 2)


def test_network_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    patches = torch.tensor([[[1.0, 2.0], [-3.0, -4.0]]])
    assert hidden_features(weight, patches).tolist() == [[1.0, 4.0]]
    assert output_design(weight, patches).tolist() == [[1.0], [4.0]]
    assert filter_design(patches).tolist() == [[1.0, -3.0], [2.0, -4.0]]


@pytest.mark.parametrize("law", LAWS)
def test_sparse_errors_are_undone(trained: TwoStage, law: str) -> None:
    theta = contaminate(trained.weight, 0.3, law, rng())
    eta = contaminate(trained.beta, 0.3, law, rng(1))
    assert accuracy(theta, trained.weight).exact_share == 0
    filters = recover_weights(theta, trained.weight_init, filter_design(PATCHES))
    assert filters.warning == ""
    assert filters.believed.all()
    assert filters.ratio == 0.1
    assert accuracy(filters.values, trained.weight).worst < 1e-12
    output = recover_output(eta, trained.beta_init, filters.values, PATCHES)
    assert output.believed.all()
    assert accuracy(output.values.T, trained.beta.T).worst < 1e-12


def test_recovery_is_of_the_training_not_of_the_start(trained: TwoStage) -> None:
    """The network has learnt, so the initial values would not pass for it."""
    first, _, last = trained.losses
    assert last < 0.2 * first
    assert accuracy(trained.weight_init, trained.weight).exact_share == 0


def test_minibatches_and_several_outputs() -> None:
    net = train(outputs=4, batch_size=3)
    filters = recover_weights(
        contaminate(net.weight, 0.3, "gaussian", rng()), net.weight_init, filter_design(PATCHES)
    )
    output = recover_output(
        contaminate(net.beta, 0.3, "gaussian", rng(1)), net.beta_init, filters.values, PATCHES
    )
    assert output.values.shape == (200, 4)
    assert accuracy(filters.values, net.weight).exact_share == 1
    assert accuracy(output.values.T, net.beta.T).exact_share == 1


def test_weight_decay_needs_the_init_in_the_design() -> None:
    net = train(weight_decay=0.05)
    design = filter_design(PATCHES)
    theta = contaminate(net.weight, 0.3, "gaussian", rng())
    assert span_residual(net.weight - net.weight_init, design).min() > 0.1
    without = recover_weights(theta, net.weight_init, design)
    assert accuracy(without.values, net.weight).exact_share == 0
    assert not without.believed.any()
    with_init = recover_weights(theta, net.weight_init, design, decayed=True)
    assert accuracy(with_init.values, net.weight).exact_share == 1
    assert with_init.believed.all()
    eta = contaminate(net.beta, 0.3, "gaussian", rng(1))
    output = recover_output(eta, net.beta_init, with_init.values, PATCHES, decayed=True)
    assert accuracy(output.values.T, net.beta.T).exact_share == 1


def test_adam_leaves_the_span(trained: TwoStage) -> None:
    design = filter_design(PATCHES)
    assert span_residual(trained.weight - trained.weight_init, design).median() < 1e-11
    net = train(optimizer="adam", learning_rate=1e-3)
    assert span_residual(net.weight - net.weight_init, design).min() > 0.1
    theta = contaminate(net.weight, 0.1, "gaussian", rng())
    with pytest.raises(ValueError, match="leave the span"):
        recover_weights(theta, net.weight_init, design, optimizer=net.optimizer)
    undeclared = recover_weights(theta, net.weight_init, design)
    assert accuracy(undeclared.values, net.weight).exact_share == 0
    assert not undeclared.believed.any()
    assert "left the span" in undeclared.warning


def test_beta_trained_jointly_is_not_recovered() -> None:
    """Its gradients came from features that moved; the filters do not mind."""
    net = train(joint=True, steps=120, output_steps=0)
    theta = contaminate(net.weight, 0.2, "gaussian", rng())
    eta = contaminate(net.beta, 0.2, "gaussian", rng(1))
    filters = recover_weights(theta, net.weight_init, filter_design(PATCHES))
    output = recover_output(eta, net.beta_init, filters.values, PATCHES)
    assert accuracy(filters.values, net.weight).exact_share == 1
    assert accuracy(output.values.T, net.beta.T).exact_share == 0
    assert not output.believed.any()


def test_more_errors_can_be_undone_with_fewer_patches(trained: TwoStage) -> None:
    """An untrained direction of the span serves as well, so one network shows both ratios."""
    theta = contaminate(trained.weight, 0.45, "gaussian", rng())
    few = recover_weights(theta, trained.weight_init, filter_design(PATCHES))
    more = torch.cat([PATCHES, torch.randn(24, 3, 240, generator=rng(5)).double()])
    many = recover_weights(theta, trained.weight_init, filter_design(more))
    assert accuracy(few.values, trained.weight).exact_share > 0.9
    assert accuracy(many.values, trained.weight).exact_share < 0.1
    assert few.believed.sum() > 180 > 20 > many.believed.sum()
    wrong = accuracy(many.values, trained.weight).errors > 1e-6
    assert not many.believed[wrong].any()


def test_a_span_of_everything_is_said_to_be_none(trained: TwoStage) -> None:
    many = torch.randn(80, 3, 240, generator=rng(5)).double()
    theta = contaminate(trained.weight, 0.1, "gaussian", rng())
    found = recover_weights(theta, trained.weight_init, filter_design(many))
    torch.testing.assert_close(found.values, theta)  # nothing was purified
    assert found.ratio == 1
    assert not found.believed.any()
    assert "span all 240 dimensions" in found.warning


def test_digits_whole(mnist_images: Tensor) -> None:
    patches = image_patches(mnist_images[:40], 28)
    net = train(patches, width=60)
    theta = contaminate(net.weight, 0.2, "gaussian", rng())
    found = recover_weights(theta, net.weight_init, filter_design(patches))
    assert accuracy(found.values, net.weight).exact_share == 1
    assert found.believed.float().mean() > 0.9


def test_digits_in_patches_are_believed_only_where_right(mnist_images: Tensor) -> None:
    """Some pixels are lit in one image alone: an error there passes for a weight."""
    patches = image_patches(mnist_images[:10], 14)
    net = train(patches)
    theta = contaminate(net.weight, 0.1, "gaussian", rng())
    found = recover_weights(theta, net.weight_init, filter_design(patches))
    right = accuracy(found.values, net.weight).errors < 1e-6
    assert 0.7 < right.float().mean() < 1
    assert found.believed.float().mean() > 0.5
    assert not found.believed[~right].any()


@pytest.mark.parametrize("law", LAWS)
def test_noise_hits_its_share(law: str) -> None:
    values = torch.randn(100, 100, generator=rng(4)).double()
    hit = contaminate(values, 0.25, law, rng())
    assert 0.24 < (hit != values).double().mean() < 0.26
    assert contaminate(values, 0.25, law, rng()).equal(hit)
    assert contaminate(values, 0, law, rng()).equal(values)
    assert law != "dropout" or set(hit[hit != values].tolist()) == {0.0}


def test_noise_is_in_units_of_the_values() -> None:
    values = torch.full((40_000,), 2.0).double()
    assert contaminate(values, 1, "gaussian", rng()).std() == pytest.approx(2, rel=0.02)
    assert contaminate(values, 1, "uniform", rng()).std() == pytest.approx(2, rel=0.02)
    quartile = (contaminate(values, 1, "cauchy", rng()) - 2).abs().median()
    assert float(quartile) == pytest.approx(2, rel=0.03)
    assert set(contaminate(values, 1, "salt", rng()).tolist()) == {22.0}


def test_bad_settings_are_refused(trained: TwoStage) -> None:
    with pytest.raises(ValueError, match="known: cauchy, dropout, gaussian"):
        contaminate(trained.beta, 0.1, "laplace", rng())
    with pytest.raises(ValueError, match="0 to 1"):
        contaminate(trained.beta, 1.5, "salt", rng())
    with pytest.raises(ValueError, match="theta and init"):
        recover_weights(trained.weight.T, trained.weight_init, filter_design(PATCHES))
    with pytest.raises(ValueError, match="'sgd' or 'adam'"):
        train(optimizer="lion")
    with pytest.raises(ValueError, match="second stage"):
        train(joint=True)
    with pytest.raises(ArithmeticError, match="lower it"):
        train(learning_rate=1e3)
