"""A device type made of the CPU's memory, as many devices as are named: what it computes is true, and as on GPUs a
tensor is on one device, operands of two are an error, and what goes from one to another is copied, and here counted.

It stands in for GPUs where there are none, to show that whatever meets in one operation was brought to one device. And
that a step waits for its device where it may: operations and waits are counted, a wait can be forbidden, and a device
can be broken, which comes to light at the next wait and stays, as on GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as tree
from torch.utils import backend_registration

NAME = "standin"
COPIES: Counter[tuple[str, str]] = Counter()
"""Tensors copied, by where from and where to."""
OPERATIONS: Counter[str] = Counter()
"""Kernels that a GPU would be given, by name: views and what only makes room are none."""
WAITS: Counter[str] = Counter()
"""Times that somebody waited for what a device has computed."""
# fmt: off
_VIEWS = {
    "view", "reshape", "expand", "permute", "transpose", "slice", "select", "unsqueeze", "squeeze", "t", "detach",
    "alias", "as_strided", "_unsafe_view", "split", "unbind", "_reshape_alias", "lift_fresh", "empty",
    "split_with_sizes", "empty_like", "new_empty", "empty_strided", "chunk", "narrow", "flatten", "diagonal",
}
# fmt: on
_STATE = {"broken": "", "forbidden": False}
_LIBRARIES: list[torch.library.Library] = []
_ATEN = torch.ops.aten


class Placed(torch.Tensor):
    """A tensor on a stand-in device, over one of the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Placed:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        placed = cls._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=device, **layout)
        placed.held = held
        return placed

    def __repr__(self) -> str:
        return f"Placed({self.device}, {self.held!r})"

    def tolist(self) -> Any:
        """Torch has none for subclasses."""
        _wait("tolist")
        return self.held.tolist()

    @classmethod
    @torch.inference_mode(False)  # a wrapper made within it could not stand for a view of one made without
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        made_of_others = func.decompose(*args, **kwargs)
        if made_of_others is not NotImplemented:
            return made_of_others
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            _wait(name)
        elif name not in _VIEWS:
            OPERATIONS[name] += 1
        if func.overloadpacket is _ATEN._to_copy:
            return _copied(args[0], kwargs.pop("device", None) or args[0].device, kwargs)
        if func.overloadpacket is _ATEN.copy_:
            _copy_from(args[1], args[0])
            return args[0]
        device = _common_device(func, (args, kwargs))
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), torch.device("cpu")
        result = func(*tree.tree_map_only(Placed, _held, args), **tree.tree_map_only(Placed, _held, kwargs))
        written = _answer_open(func, args, kwargs)
        if written is not None:
            return written
        return tree.tree_map_only(torch.Tensor, lambda each: _on(device, each), result)


def device(index: int) -> torch.device:
    """The stand-in device of this number."""
    if not _LIBRARIES:
        backend_registration._setup_privateuseone_for_python_backend(NAME)
        library = torch.library.Library("aten", "IMPL")
        library.impl("empty.memory_format", _empty, "PrivateUse1")
        library.impl("empty_strided", _empty_strided, "PrivateUse1")
        library.impl("_copy_from", _copy_from, "PrivateUse1")
        library.impl("_local_scalar_dense", _item, "PrivateUse1")  # within torch.tensor
        _LIBRARIES.append(library)
    return torch.device(NAME, index)


def _common_device(func: Any, operands: Any) -> torch.device:
    tensors = [each for each in tree.tree_leaves(operands) if isinstance(each, torch.Tensor)]
    devices = {each.device for each in tensors if each.dim() or each.device.type != "cpu"}  # as CUDA: bare numbers pass
    if len(devices) > 1:
        raise RuntimeError(f"{func}: operands on {', '.join(sorted(map(str, devices)))}")
    return devices.pop()


def _answer_open(func: Any, args: Any, kwargs: Any) -> Any:
    """The operand that an in-place operation writes to and returns, if it is one."""
    returned = func._schema.returns
    if len(returned) != 1 or returned[0].alias_info is None or not returned[0].alias_info.is_write:
        return None
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[place] if place < len(args) else kwargs[argument.name]
    return None


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, Placed) else tensor


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if device.type == "cpu" else Placed(tensor, device)


def _copied(tensor: torch.Tensor, device: Any, how: dict[str, Any]) -> torch.Tensor:
    device = torch.device(device)
    _count(tensor.device, device)
    how = {name: how[name] for name in ("dtype", "memory_format") if name in how}
    return _on(device, _ATEN._to_copy(_held(tensor), **how))


def _count(source: torch.device, target: torch.device) -> None:
    if source != target:
        COPIES[str(source), str(target)] += 1
        if target.type == "cpu":
            _wait("copy")


def _wait(how: str) -> None:
    WAITS[how] += 1
    if _STATE["forbidden"]:
        raise AssertionError(f"the host waits for a device within a forward: {how}")
    if _STATE["broken"]:
        raise RuntimeError(_STATE["broken"])


@contextmanager
def no_waits() -> Iterator[None]:
    """AssertionError for whoever waits."""
    _STATE["forbidden"] = True
    try:
        yield
    finally:
        _STATE["forbidden"] = False


@contextmanager
def broken(error: str = "CUDA error: device-side assert triggered") -> Iterator[None]:
    """A device that computes nothing any more."""
    _STATE["broken"] = error
    try:
        yield
    finally:
        _STATE["broken"] = ""


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **how: Any) -> torch.Tensor:
    return Placed(_unwritten(torch.empty(size, dtype=dtype)), torch.device(device))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **how: Any) -> torch.Tensor:
    return Placed(_unwritten(torch.empty_strided(size, stride, dtype=dtype)), torch.device(device))


def _unwritten(tensor: torch.Tensor) -> torch.Tensor:
    """Memory that nobody has written: who reads it finds NaN."""
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def _item(tensor: Placed) -> Any:
    _wait("item")
    return tensor.held.item()


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _count(source.device, target.device)
    _held(target).copy_(_held(source))
    return target
