"""Savepoint: the state of a training after a whole epoch, from which a killed one goes on.

It then ends as if nothing had happened, bit for bit, on the same machine, device and threads. A
state is one file: the sha256 of what follows, which is verified before any of it is parsed, a line
of JSON, and tensors as safetensors. Nothing is unpickled.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from . import interrupt
from .progress import Progress
from .settings import canonical
from .storage import set_aside, sha256, write_atomic

SHARE = 0.05  # of the time at most goes into saving: an epoch may take a second, a state as long
Part = nn.Module | torch.optim.Optimizer | torch.Generator | list[Any]


class Savepoints:
    """Where the trainings of one attack leave their states: a file for each. They are numbered,
    for a deterministic attack trains in the same order every time.

    Args:
        folder: theirs alone.
        identity: JSON-able; all that decides the trainings. A state of another is left alone.
        device: that the trainings run on.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], device: torch.device, progress: Progress
    ) -> None:
        self.folder, self.device, self.progress = folder, device, progress
        self.identity = sha256(canonical(identity).encode())
        self.count = 0
        self.earlier_seconds = 0.0  # that trainings had taken before this process went on with them

    def training(self, parts: Sequence[Part]) -> Callable[[], None]:
        """Fill ``parts`` with the next training's state, where one lies there; the global
        generators go with them. What is returned is for the end of every epoch: it saves a state,
        unless that took more than ``SHARE`` of the time, and lets a Ctrl-C end the training."""
        self.count += 1
        file = self.folder / f"training-{self.count}.state"
        found = self._read(file)
        earlier = 0.0
        if found is not None:
            earlier, states = found
            self.earlier_seconds += earlier
            for part, state in zip(parts, states[:-1], strict=True):
                _fill(part, state)
            _seed(states[-1], self.device)
        start = last = time.perf_counter()
        took = 0.0

        def keep() -> None:
            nonlocal last, took
            now = time.perf_counter()
            if now - last < took / SHARE and not interrupt.asked():
                return
            tensors: dict[str, Tensor] = {}
            states = [_state(part) for part in parts] + [_chance(self.device)]
            card = {
                "identity": self.identity,
                "seconds": earlier + now - start,
                "states": _pack(states, tensors),
            }
            body = json.dumps(card).encode() + b"\n" + save(tensors)
            write_atomic(file, sha256(body).encode() + b"\n" + body)
            last = time.perf_counter()
            took = last - now
            interrupt.check()

        return keep

    def clear(self) -> None:
        """Remove all states, and of a process that was killed the one that it was writing."""
        for pattern in ("training-*.state", ".training-*.state.*"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # not there, or something damaged is kept in it
            self.folder.rmdir()

    def _read(self, file: Path) -> tuple[float, list[Any]] | None:
        try:
            digest, _, body = file.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if digest != sha256(body).encode():
            place = set_aside(file)
            self.progress.say(f"{file} is damaged: kept as {place.name}, this training begins anew")
            return None
        card, _, tensors = body.partition(b"\n")
        found = json.loads(card)
        if found["identity"] != self.identity:
            self.progress.say(f"{file} is of other code, versions, device or threads: begun anew")
            return None
        return found["seconds"], _unpack(found["states"], load(tensors), self.device)


def resumed(savepoints: Savepoints | None, *parts: Part) -> Callable[[], None]:
    """``savepoints.training(parts)``; without savepoints nothing is filled and nothing saved."""
    return interrupt.check if savepoints is None else savepoints.training(parts)


def _state(part: Part) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part if isinstance(part, list) else part.state_dict()


def _fill(part: Part, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, list):
        part[:] = state
    else:
        part.load_state_dict(state)


def _chance(device: torch.device) -> dict[str, Any]:
    """The state of the global generators, as ``isolated`` seeds them."""
    name, keys, *rest = np.random.get_state()
    return {
        "random": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _seed(chance: dict[str, Any], device: torch.device) -> None:
    random.setstate(chance["random"])
    np.random.set_state(chance["numpy"])
    torch.set_rng_state(chance["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(chance["cuda"], device)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go to ``tensors``, their order in memory stays with it."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        stride = torch.empty_like(value, device="meta").stride()
        return {"tensor": name, "stride": stride, "host": value.device.type == "cpu"}
    if isinstance(value, dict):
        return {"dict": [(key, _pack(each, tensors)) for key, each in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(each, tensors) for each in value]}
    return [_pack(each, tensors) for each in value] if isinstance(value, list) else value


def _unpack(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """What ``_pack`` was given. A fused optimiser takes its state in the weights' order alone."""
    if isinstance(value, list):
        return [_unpack(each, tensors, device) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        kept = tensors[value["tensor"]]
        place = torch.device("cpu") if value["host"] else device
        empty = torch.empty_strided(kept.shape, value["stride"], dtype=kept.dtype, device=place)
        return empty.copy_(kept)
    if "tuple" in value:
        return tuple(_unpack(value["tuple"], tensors, device))
    return {key: _unpack(each, tensors, device) for key, each in value["dict"]}
