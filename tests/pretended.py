"""A CUDA device that is none: tensors say that they lie there, and lie in the CPU's memory.

What a GPU refuses is refused (``Refused``): tensors of two devices in one operation, a generator of
the other device, NumPy, waiting while a graph is captured. What makes the host wait for a GPU is
counted in ``waits``. Captured graphs are replayed, operation by operation.

It cannot tell of kernels (their accuracy, their speed, their memory), of streams or of bf16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
_SET_DATA = vars(torch._C.TensorBase)["data"].__set__

# take tensors of both devices
_ACROSS = {
    "__getitem__", "__set__", "__setitem__", "_has_compatible_shallow_copy_type", "copy_",
    "type_as",
}  # fmt: skip
# scalars on the CPU may not stand among these
_STRICT = {"cat", "concat", "stack"}
# the host waits for the numbers, or to know how many there are
_READS = {
    "__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "argwhere",
    "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero", "tolist", "unique",
    "unique_consecutive",
}  # fmt: skip

waits: Counter[str] = Counter()
_may_wait = True
_captured: list[Graph] = []


class Refused(RuntimeError):
    """A GPU would not do it."""


class There(Tensor):
    """A tensor that says it is on ``DEVICE``."""

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = _like(self, self.detach().clone())
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(call, args, kwargs or {})


class _Generator(torch.Generator):
    """Knows which device it was made for, and draws as a CPU's."""

    where: torch.device

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.where = torch.device(device)
        return made

    device = property(lambda self: self.where)


class _Mode(TorchFunctionMode):
    """Sees what no tensor of the device takes part in: what makes one."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(call, args, kwargs or {})


def _called(call: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(call, "__name__", "")
    if name == "__set__" and call == _SET_DATA:
        return _move(*args)
    if name in ("to", "cuda", "cpu") and args and isinstance(args[0], Tensor):
        return _converted(name, args[0], args[1:], kwargs)
    if name == "pin_memory":
        return args[0]
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = [each for each in tensors if isinstance(each, There)]
    here = [each for each in tensors if not isinstance(each, There)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    on_device = bool(there) if wanted is None else wanted.type == "cuda"
    if there or on_device or kwargs.get("generator") is not None:
        _check(name, args, kwargs, there, here, on_device)
    if on_device and not there and name in ("as_tensor", "tensor"):
        _wait("copy to the device")
    if wanted is not None and wanted.type == "cuda":
        kwargs = {**kwargs, "device": CPU}
    with torch._C.DisableTorchFunction():
        out = call(*args, **kwargs)
        return _tagged(out) if on_device else out


def _check(
    name: str, args: Any, kwargs: dict[str, Any], there: Any, here: Any, on_device: bool
) -> None:
    generator = kwargs.get("generator")
    if generator is not None and on_device != (generator.device.type == "cuda"):
        raise Refused(f"{name}: a generator on {generator.device}")
    if generator is not None and _captured:
        raise Refused(f"{name}: a graph knows the device's own generator alone")
    if name in ("numpy", "__array__", "__reduce_ex__"):
        raise Refused(f"{name}: of a tensor on {DEVICE}")
    if name in ("__getitem__", "__setitem__"):
        _check_index(name, *args)
    elif name == "copy_" and here and not kwargs.get("non_blocking") and here[0].dim():
        _wait(name)
    if name in _ACROSS:
        return
    if there and any(each.dim() or name in _STRICT for each in here):
        raise Refused(f"{name}: tensors on {DEVICE} and on the CPU")
    if name in _READS or (name == "repeat_interleave" and len(there) > 1):
        _wait(name)


def _check_index(name: str, tensor: Tensor, index: Any, value: Any = None) -> None:
    parts = [each for each in tree_leaves(index) if isinstance(each, Tensor)]
    if not isinstance(tensor, There):
        if any(isinstance(each, There) for each in parts):
            raise Refused(f"{name}: of a CPU tensor, at an index on {DEVICE}")
        return
    if isinstance(index, list) or any(each.dim() and not isinstance(each, There) for each in parts):
        _wait(f"{name} at an index from the CPU")
    for each in parts:
        if isinstance(each, There) and not each.dim():
            _wait(f"{name} at a number on the device")
        elif each.dtype == torch.bool and (
            name == "__getitem__" or (isinstance(value, Tensor) and value.dim())
        ):
            _wait(f"{name} by a mask")


def _wait(what: str) -> None:
    if _captured or not _may_wait:
        raise Refused(f"{what}: the host may not wait now")
    waits[what] += 1


def _tagged(out: Any) -> Any:
    """``out`` with its CPU tensors on the device."""
    if isinstance(out, torch.Size | There) or not isinstance(out, Tensor | list | tuple):
        return out
    if not isinstance(out, Tensor):
        parts = [_tagged(each) for each in out]
        return parts if isinstance(out, list) else type(out)(parts)
    if out.device.type != "cpu":
        return out
    if out.requires_grad and out.is_leaf:
        return _like(out, out.detach())
    return out.as_subclass(There)


def _like(model: Tensor, held: Tensor) -> Tensor:
    """A leaf on the device with the numbers in ``held``."""
    with torch._C.DisableTorchFunction():
        made = Tensor._make_subclass(There, held.as_subclass(Tensor), model.requires_grad)
        if isinstance(model, nn.Parameter):
            made._is_param = True
        if model.grad is not None:
            made.grad = model.grad.detach().clone()
    return made


def _move(tensor: Tensor, data: Tensor) -> None:
    """``tensor.data = data``: a network's parameters stay who they are when it moves."""
    with torch._C.DisableTorchFunction():
        is_param = isinstance(tensor, nn.Parameter)
        _SET_DATA(tensor, data)
        if isinstance(data, There):
            tensor.__class__ = There
            if is_param:
                tensor._is_param = True
        else:
            tensor.__class__ = nn.Parameter if is_param else Tensor


def _converted(name: str, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """``tensor.to(...)``; what moves is copied."""
    kwargs = dict(kwargs)
    wanted: torch.device | None = {"cuda": DEVICE, "cpu": CPU}.get(name)
    if name != "to":
        args = ()
    elif "device" in kwargs:
        device = kwargs.pop("device")
        wanted = None if device is None else torch.device(device)
    elif args and isinstance(args[0], Tensor):
        other, args = args[0], args[1:]
        wanted = other.device
        kwargs["dtype"] = other.dtype
    elif args and not isinstance(args[0], torch.dtype):
        wanted, args = None if args[0] is None else torch.device(args[0]), args[1:]
    if wanted is not None and wanted.type not in ("cpu", "cuda"):
        with torch._C.DisableTorchFunction():
            return tensor.to(wanted, *args, **kwargs)
    was = isinstance(tensor, There)
    moves = wanted is not None and (wanted.type == "cuda") != was
    if moves and not kwargs.get("non_blocking"):
        _wait("copy from the device" if was else "copy to the device")
    with torch._C.DisableTorchFunction():
        out = tensor.to(CPU, *args, **kwargs)
        if not moves:
            return out if out is tensor or not was else _tagged(out)
        out = out.clone() if out is tensor else out
        return out.as_subclass(Tensor if was else There)


# --- graphs -------------------------------------------------------------------------------------


class Graph(TorchDispatchMode):
    """Takes down what is done inside, and then undoes it; ``replay`` does it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [
            value
            for given, value in zip(op._schema.arguments, args, strict=False)
            if (given.alias_info and given.alias_info.is_write) or "batch_norm" in str(op)
        ] + [
            kwargs[given.name]
            for given in op._schema.arguments
            if given.name in kwargs and given.alias_info and given.alias_info.is_write
        ]
        for each in tree_leaves(written):
            if isinstance(each, Tensor):
                self.before.append((each, each.clone()))
        out = op(*args, **kwargs)
        self.steps.append((op, args, kwargs, _tensors(out)))
        return out

    def undo(self) -> None:
        for place, value in reversed(self.before):
            place.copy_(value)
        self.before.clear()

    def replay(self) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for op, args, kwargs, places in self.steps:
                for place, value in zip(places, _tensors(op(*args, **kwargs)), strict=True):
                    if place.data_ptr() != value.data_ptr():
                        place.copy_(value)


def _tensors(found: Any) -> list[Tensor]:
    return [each for each in tree_leaves(found) if isinstance(each, Tensor)]


@contextmanager
def _capture(graph: Graph, stream: object = None) -> Iterator[None]:
    chance = torch.get_rng_state()
    _captured.append(graph)
    try:
        with graph:
            yield
    finally:
        _captured.pop()
    with torch._C.DisableTorchFunction(), torch.no_grad():
        graph.undo()
    torch.set_rng_state(chance)


# --- the device ---------------------------------------------------------------------------------


def _set_sync_debug_mode(mode: str) -> None:
    global _may_wait
    _may_wait = mode != "error"


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Inside, torch sees one CUDA device."""
    grouped = torch._C._group_tensors_by_device_and_dtype

    def group(lists: Any, with_indices: bool = False) -> Any:
        found = grouped(lists, with_indices)
        if any(isinstance(each, There) for each in tree_leaves(lists)):
            return {(DEVICE, kind): each for (_, kind), each in found.items()}
        return found

    stream = SimpleNamespace(
        wait_stream=lambda other: None, is_capturing=lambda: bool(_captured), device=DEVICE
    )
    state = torch.get_rng_state
    stand_ins = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a pretended GPU",
        "synchronize": lambda *_: None,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 1,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_: state(),
        "set_rng_state": lambda *_: None,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "Stream": lambda *_: stream,
        "current_stream": lambda *_: stream,
        "stream": lambda *_: nullcontext(),
        "device": lambda *_: nullcontext(),
        "is_current_stream_capturing": lambda: bool(_captured),
        "CUDAGraph": Graph,
        "graph": _capture,
    }
    waits.clear()
    with ExitStack() as stack:
        for name, value in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.accelerator, "current_stream", lambda *_: stream))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        stack.enter_context(patch.object(torch._C, "_group_tensors_by_device_and_dtype", group))
        stack.enter_context(_Mode())
        yield DEVICE
