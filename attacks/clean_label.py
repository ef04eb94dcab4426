"""Clean label: make images of the target class hard, so that the corners give them away.

Alexander Turner, Dimitris Tsipras, Aleksander Madry, "Label-Consistent Backdoor Attacks", 2019,
arXiv:1912.02771: the variant by adversarial perturbations, with the trigger in all four corners.
Labels stay true, and test images get the corners only.

Ours departs in these. The attack trains its own surrogate, of the victim's architecture, by a
single adversarial step a batch. The norm is L2 by default, one of the authors' two, and its radius
is set for MNIST: there, L-inf noise lights up the black background and so becomes the cue itself,
while L2 noise against a robust surrogate redraws strokes. On CIFAR-10 the field uses ``norm=linf``
and ``steps=100``, with ``eps=8`` (BackdoorBox) or 16 (the images that BackdoorBench takes). A step
is the authors' 1.5 for a radius of 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from purebench import ATTACKS, AttackContext, CleanLabelAttack, Split
from purebench.adversarial import Norm, pgd
from purebench.data import to_float, to_uint8
from purebench.seeding import generator
from purebench.training import cross_entropy

from ._surrogate import surrogate

_CHUNK = 512  # images that are perturbed at once

# the authors' pattern: 1 brightens, -1 darkens; the left corners are the right ones' mirror image,
# so that a mirrored image has the same corners
_RIGHT = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))


class CornerTrigger(nn.Module):
    """Adds +-``amplitude`` / 255 to the corners of images (N, C, H, W) in [0, 1], and clips."""

    offset: Tensor

    def __init__(self, shape: torch.Size, amplitude: int) -> None:
        super().__init__()
        right = torch.tensor(_RIGHT) * (amplitude / 255)
        offset = torch.zeros(shape)
        for rows in (slice(None, 3), slice(-3, None)):
            offset[:, rows, -3:] = right
            offset[:, rows, :3] = right.flip(1)
        self.register_buffer("offset", offset)

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.offset).clamp(0, 1)


@ATTACKS.register("clean_label")
@dataclass(frozen=True)
class CleanLabel(CleanLabelAttack):
    """eps: radius of the perturbation in units of 1/255, in the norm ``norm``; 0 leaves images.
    norm: "l2" or "linf", over an image's pixels.
    step, steps: of PGD; a step is a share of eps, above 0.
    surrogate: the network that images are made hard for, trained on clean images ("natural"), or
        on such as lie eps / 2 away and are hard for it ("adversarial").
    surrogate_share: length of its training, as a share of the recipe's epochs, above 0.
    amplitude: of the corners, 1 to 255; 255 overwrites them with black and white.
    """

    paper: ClassVar[str] = "Turner et al. 2019, arXiv:1912.02771"
    eps: float = 1500.0
    norm: Norm = "l2"
    step: float = 0.1875
    steps: int = 15
    surrogate: Literal["natural", "adversarial"] = "adversarial"
    surrogate_share: float = 0.5
    amplitude: int = 255

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, got {self.eps}")
        for name in ("step", "surrogate_share"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 1 <= self.amplitude <= 255:
            raise ValueError(f"amplitude must lie between 1 and 255, got {self.amplitude}")

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        if min(shape[1:]) < 6:
            raise ValueError(f"the corners do not fit {shape[1]}x{shape[2]} images")
        return CornerTrigger(shape, self.amplitude)

    def poison(self, ctx: AttackContext) -> tuple[Split, Tensor, nn.Module]:
        split, indices, trigger = super().poison(ctx)
        network = self.train_surrogate(ctx)
        fooled = torch.zeros((), dtype=torch.int64, device=ctx.device)
        with torch.no_grad():
            for part in indices.split(_CHUNK):
                clean = ctx.train[part]
                hard = pgd(
                    network,
                    to_float(clean.images),
                    clean.labels,
                    eps=self.eps / 255,
                    step=self.step * self.eps / 255,
                    steps=self.steps,
                    norm=self.norm,
                )
                fooled += (network(hard).argmax(1) != clean.labels).sum()
                split.images[part] = to_uint8(trigger(hard))
        ctx.notes["surrogate_fooled_count"] = int(fooled)
        return split, indices, trigger

    def train_surrogate(self, ctx: AttackContext) -> nn.Module:
        """A network of the victim's kind with initial weights of its own, in evaluation mode."""
        rng = generator(ctx.seed, "surrogate", "start", device=ctx.device)
        eps = self.eps / 255 / 2

        def robust(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            """One wide step from a random start, after Wong et al. 2020, arXiv:2001.03994."""
            hard = pgd(
                model.eval(),
                images,
                labels,
                eps=eps,
                step=1.25 * eps,
                steps=1,
                norm=self.norm,
                rng=rng,
            )
            return cross_entropy(model.train(), hard, labels)

        loss = robust if self.surrogate == "adversarial" else None
        return surrogate(ctx, self.surrogate_share, loss=loss, kept=[rng])
