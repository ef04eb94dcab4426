"""Watch: what enters and leaves chosen modules while images pass, gradients and all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Seen = dict[nn.Module, tuple[Tensor, Tensor]]


@contextmanager
def watching(modules: Iterable[nn.Module]) -> Iterator[Seen]:
    """Inside, a forward pass writes each module's (input, output) into the dictionary, in the
    order in which modules give theirs; of a module that is used twice, the last."""
    seen: Seen = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.pop(module, None)  # the last use also takes the last place
        seen[module] = inputs[0], output

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
