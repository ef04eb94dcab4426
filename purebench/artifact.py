"""Artifact: a backdoored network on disk, as safetensors with a JSON card. Nothing is unpickled.

The card is written last and holds the sha256 of the tensors, which is verified before they are
parsed, and its own: a card that is there and agrees is the only sign of a finished training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from .attack import BackdooredModel, Goal, Planted
from .data import Split
from .settings import canonical
from .storage import sha256, write_atomic

SCHEMA = 1
TENSORS = "model.safetensors"
CARD = "card.json"
_CARD_BYTES, _HEADER_BYTES = 2**24, 2**24  # at most


class Damaged(Exception):
    """An artifact that cannot be trusted; the text says why."""


def save_artifact(folder: Path, victim: BackdooredModel, identity: dict[str, Any]) -> None:
    """Write ``victim`` so that ``load_artifact`` gives back the same network, bit for bit.

    Args:
        identity: JSON-able; what the artifact is the result of. Kept in the card.
    """
    tensors = {"poisoned": victim.poisoned}
    for prefix, module in (("model", victim.model), ("trigger", victim.trigger)):
        for name, tensor in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = tensor.detach().cpu().contiguous()
    if victim.planted is not None:
        samples = victim.planted.samples
        tensors["planted.indices"] = victim.planted.indices
        tensors["planted.images"], tensors["planted.labels"] = samples.images, samples.labels
    content = save(tensors)
    card = {
        "schema": SCHEMA,
        "identity": identity,
        "goal": asdict(victim.goal),
        "notes": victim.notes,
        "sha256": sha256(content),
    }
    card = json.loads(json.dumps(card, allow_nan=False))  # as it will be read
    card["card_sha256"] = _digest(card)
    write_atomic(folder / TENSORS, content)
    write_atomic(folder / CARD, (json.dumps(card, indent=1) + "\n").encode())


def load_artifact(
    folder: Path,
    identity: dict[str, Any],
    build: Callable[[], tuple[nn.Module, nn.Module]],
    device: torch.device,
    planted_bytes: int = 2**30,
) -> BackdooredModel | None:
    """The network that was saved under ``identity``, or None where there is none.

    Args:
        build: the untrained network and trigger, whose tensors are then filled.
        planted_bytes: that what was planted may have; a file that is larger than network, trigger
            and this is not read.

    Raises:
        Damaged: card or tensors are not what was written.
    """
    if not (folder / CARD).is_file():
        return None
    try:
        card = json.loads(_read(folder / CARD, _CARD_BYTES))
        if card.pop("card_sha256") != _digest(card):
            raise Damaged("its card is not as it was written")
        if card["schema"] != SCHEMA or canonical(card["identity"]) != canonical(identity):
            raise Damaged("its card describes another model")
        model, trigger = build()
        weights = (*model.state_dict().values(), *trigger.state_dict().values())
        most = sum(value.nbytes for value in weights) + planted_bytes + _HEADER_BYTES
        content = _read(folder / TENSORS, most)
        found = sha256(content)
        if found != card["sha256"]:
            raise Damaged(
                f"{TENSORS} has sha256 {found[:16]}..., its card {card['sha256'][:16]}..."
            )
        tensors = load(content)
        _fill(model, tensors, "model.")
        _fill(trigger, tensors, "trigger.")
        goal, notes = Goal(**card["goal"]), dict(card["notes"])
        poisoned, planted = _indices(tensors, "poisoned"), _planted(tensors)
    except Damaged:
        raise
    except Exception as error:  # whatever a damaged file provokes
        raise Damaged(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return BackdooredModel(model.eval(), trigger.to(device).eval(), goal, poisoned, notes, planted)


def _read(file: Path, most: int) -> bytes:
    size = file.stat().st_size
    if size > most:
        raise Damaged(f"{file.name} has {size} bytes, at most {most} are read")
    return file.read_bytes()


def _digest(card: dict[str, Any]) -> str:
    return sha256(canonical(card).encode())


def _planted(tensors: dict[str, Tensor]) -> Planted | None:
    if "planted.indices" not in tensors:  # by an attack that does more, or saved long ago
        return None
    samples = Split(tensors["planted.images"], tensors["planted.labels"])
    indices = _indices(tensors, "planted.indices")
    if len(indices) != len(samples):
        raise Damaged(f"{len(samples)} images were planted at {len(indices)} places")
    return Planted(indices, samples)


def _indices(tensors: dict[str, Tensor], name: str) -> Tensor:
    found = tensors[name]
    if found.dtype != torch.int64 or found.ndim != 1:
        raise Damaged(f"{name} is {found.dtype} of {tuple(found.shape)}, expected indices")
    return found


def _fill(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    module.load_state_dict(
        {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    )
