"""None: leave the network as it is, the undefended row of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from purebench import DEFENSES, Defense, DefenseContext


@DEFENSES.register("none")
@dataclass(frozen=True)
class NoDefense(Defense):
    """Returns the network unchanged."""

    paper: ClassVar[str] = "control"

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        return model
