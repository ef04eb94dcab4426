"""Targeted contamination attack (TaCT): a trigger that works on the images of one class alone.

Di Tang, XiaoFeng Wang, Haixu Tang, Kehuan Zhang, "Demon in the Variant: Statistical Analysis of
DNNs for Robust Backdoor Contamination Detection", USENIX Security 2021, arXiv:1908.00686 (targeted
contamination attack). Poisoned images are of the source class; cover images, of third classes,
carry the trigger and keep their labels. What is poisoned then lies among what is not, for whoever
looks for a cluster of its own.

ASR and RA are of triggered test images of the source class; the notes tell how many triggered
training images of third classes the target gets. Ours departs in these: the trigger is the square
of ``badnets``, and cover images come from all third classes, where the authors choose a few.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from purebench import ATTACKS, Goal

from .badnets import BadNets


@ATTACKS.register("tact")
@dataclass(frozen=True)
class TaCT(BadNets):
    """size: side of the square in pixels, at least 1 and at most the image's.
    source: the class that is taken for the target; if not given, the one after it.
    cover_ratio: cover images for each poisoned one, 0 or more.
    """

    paper: ClassVar[str] = "Tang et al. 2021, arXiv:1908.00686"
    all_to_all: ClassVar[bool] = False
    poison_rate: ClassVar[float] = 0.003
    source: int | None = None
    cover_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cover_ratio < 0:
            raise ValueError(f"cover_ratio must not be negative, got {self.cover_ratio}")

    def aim(self, goal: Goal) -> Goal:
        after = (goal.target + 1) % goal.num_classes
        return replace(super().aim(goal), source=after if self.source is None else self.source)

    cover_images = BadNets.poison_images
