"""Every architecture keeps the contract; sizes are pinned, and the small ones worked by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from purebench import MODELS, Architecture, Normalise, Task
from purebench.model import parameter_count

DIGITS = Task((1, 28, 28), 10, (0.13,), (0.31,))
PHOTOS = Task((3, 32, 32), 10, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
TINY = Task((1, 8, 8), 10, (0.5,), (0.5,))


def network(name: str, task: Task, **settings: object) -> nn.Module:
    return MODELS[name](**settings).build(task)


@dataclass
class Case:
    """One architecture on one task, and two images for it."""

    architecture: Architecture
    task: Task

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.architecture.build(self.task).eval()

    @property
    def images(self) -> Tensor:
        return torch.rand(2, *self.task.shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(
    scope="module",
    params=[(name, task) for task in (DIGITS, PHOTOS) for name in MODELS.names()],
    ids=lambda param: f"{param[0]}-{'x'.join(map(str, param[1].shape))}",
)
def case(request: pytest.FixtureRequest) -> Case:
    name, task = request.param
    case = Case(MODELS[name](), task)
    try:
        case.build()
    except ValueError as misfit:
        pytest.skip(str(misfit))
    return case


@pytest.fixture(scope="module")
def model(case: Case) -> nn.Module:
    return case.build()


@torch.no_grad()
def test_logits(case: Case, model: nn.Module) -> None:
    logits = model(case.images)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert logits.dtype == torch.float32


def test_normalise_comes_first_and_the_head_last(model: nn.Module) -> None:
    layers = [module for module in model.modules() if not list(module.children())]
    assert isinstance(layers[0], Normalise)
    assert isinstance(layers[-1], nn.Linear)
    assert layers[-1].out_features == 10


def test_initial_weights_follow_from_the_global_seed(case: Case, model: nn.Module) -> None:
    twin, other = case.build().state_dict(), case.build(seed=1).state_dict()
    assert all(torch.equal(value, twin[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, other[name]) for name, value in twin.items())


@torch.no_grad()
def test_weights_survive_safetensors(case: Case, model: nn.Module) -> None:
    """safetensors refuses weights that share memory."""
    copy = case.build(seed=1)
    copy.load_state_dict(load(save(model.state_dict())))
    assert torch.equal(copy(case.images), model(case.images))


@torch.no_grad()
def test_memory_format_leaves_the_logits(case: Case, model: nn.Module) -> None:
    want = model(case.images)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        model(case.images.contiguous(memory_format=torch.channels_last)), want, rtol=1e-3, atol=1e-4
    )


@torch.no_grad()
def test_an_image_is_judged_alone(case: Case, model: nn.Module) -> None:
    together, alone = model(case.images), model(case.images[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-4)


def test_gradients_reach_every_weight_and_hooks_keep_what_they_saw(
    case: Case, model: nn.Module
) -> None:
    """An operation in place would change an output after a hook kept it."""
    kept: list[tuple[str, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: kept.append((name, output, output.clone()))
        )
        for name, module in model.named_modules()
    ]
    images = case.images
    model(images).square().sum().backward()
    for hook in hooks:
        hook.remove()
    assert torch.equal(images, case.images)
    assert [name for name, output, then in kept if not torch.equal(output, then)] == []
    unreached = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    model.zero_grad()
    assert unreached == []


@pytest.mark.parametrize(
    ("name", "digits", "photos"),
    [
        ("lenet", 61_706, 62_006),  # LeNet-5 with full connections, as in the textbooks
        ("one_hidden", 512 * (784 + 10), 512 * (3 * 1024 + 10)),
        ("preact_resnet18", 11_169_994, 11_171_146),
        ("resnet18", 11_172_810, 11_173_962),
        ("small_cnn", 48_042, 48_842),
        ("vgg11_bn", None, 9_231_114),
    ],
)
def test_parameter_counts(name: str, digits: int | None, photos: int) -> None:
    with torch.device("meta"):
        if digits is not None:
            assert parameter_count(network(name, DIGITS)) == digits
        assert parameter_count(network(name, PHOTOS)) == photos


@pytest.mark.parametrize("name", sorted({*MODELS.names()} - {"one_hidden"}))
def test_a_misfit_says_what_would_fit(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.* takes images of .* and larger, got 8x8"):
        network(name, TINY)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("one_hidden", {"filters": 0}, "filters must be at least 1"),
        ("one_hidden", {"patch": 0}, "patch must be at least 1"),
        ("resnet18", {"stem": "large"}, "stem must be small or imagenet"),
        ("preact_resnet18", {"width": 0}, "width must be at least 1"),
        ("small_cnn", {"width": 0}, "width must be at least 1"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS[name](**settings)


def test_a_patch_must_divide_the_image() -> None:
    with pytest.raises(ValueError, match=r"patch 5 does not .* 28x28 image; 1, 2, 4, 7, 14, 28 or"):
        network("one_hidden", DIGITS, patch=5)


def test_vgg_needs_room_for_five_halvings() -> None:
    with pytest.raises(ValueError, match="32x32 and larger, got 28x28"):
        network("vgg11_bn", DIGITS)


@torch.no_grad()
def test_imagenet_stem() -> None:
    torch.manual_seed(0)
    model = network("resnet18", PHOTOS, stem="imagenet").eval()
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    assert parameter_count(model) == 11_181_642
    with pytest.raises(ValueError, match="imagenet stem takes images of 32x32 and larger"):
        network("resnet18", DIGITS, stem="imagenet")


@torch.no_grad()
def test_one_hidden_by_hand() -> None:
    """Two patches, (1 2) over (3 4) and zeros over (0 5); m = 2, so c = 1/2.

    Filter 1 sums a patch: 10 and 5. Filter 2 is top left minus bottom right: 1 - 4 and 0 - 5, both
    below zero. Filter 3 is bottom right minus top left: 3 and 5.
    """
    task = Task((1, 2, 4), 2, (0.0,), (1.0,))
    model = network("one_hidden", task, filters=3, patch=2)
    model.load_state_dict(
        {
            "hidden.weight": torch.tensor(
                [[[[1.0, 1], [1, 1]]], [[[1, 0], [0, -1]]], [[[-1, 0], [0, 1]]]]
            ),
            "head.weight": torch.tensor([[1.0, 7, 1], [2, 7, -1]]),
        },
        strict=False,
    )
    image = torch.tensor([[[[1.0, 2, 0, 0], [3, 4, 0, 5]]]])
    assert model(image).tolist() == [[(15 + 8) / 2, (2 * 15 - 8) / 2]]


@torch.no_grad()
def test_normalise_by_hand() -> None:
    layer = Normalise(Task((2, 1, 1), 2, (0.5, 0.25), (0.5, 0.125)))
    assert layer(torch.tensor([[[[1.0]], [[0.0]]]])).flatten().tolist() == [1.0, -2.0]
