"""What kernels are told, declared once: the writer in Python takes a struct's fields by name and checks what they point
to, the reader in LLVM's code (`Code.field`) takes their places from the same declaration.

Every field is eight bytes: an integer, or a pointer to elements of one kind in a declared shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Structs = npt.NDArray[Any]
"""Of a struct's dtype, any shape."""
_BYTES = 8  # of a field


@dataclass(frozen=True, eq=False)
class Element:
    """What a pointer points to."""

    name: str
    torch: tuple[torch.dtype, ...]
    numpy: tuple[Any, ...]


FLOAT32 = Element("float32", (torch.float32,), (np.dtype(np.float32),))
INT64 = Element("int64", (torch.int64,), (np.dtype(np.int64),))
BYTE = Element("byte", (torch.uint8, torch.bool), (np.dtype(np.uint8), np.dtype(np.bool_)))


class Along:
    """What lies along the first dimension of a tensor or array, each for a struct of its own: alike but for where it
    begins."""

    def __init__(self, whole: torch.Tensor | npt.NDArray[Any]) -> None:
        self.first = whole[0]
        self.addresses: Ints
        if isinstance(whole, torch.Tensor):
            self.addresses = whole.data_ptr() + whole.stride(0) * whole.element_size() * np.arange(len(whole))
        else:
            self.addresses = addresses(whole)


Pointee = torch.Tensor | npt.NDArray[Any] | Along


class Field:
    """A place of a struct."""

    def __init__(self, element: Element | type[Struct] | None, shape: tuple[str | int, ...], step: str | None) -> None:
        self.element, self.shape, self.step = element, shape, step
        self.name, self.place = "", 0
        self._constant = math.prod(size for size in shape if isinstance(size, int))
        self._names = [size for size in shape if isinstance(size, str)]
        kinds = element.numpy if isinstance(element, Element) else () if element is None else (element.dtype,)
        self._numpy, self._torch = kinds, element.torch if isinstance(element, Element) else ()

    def address(self, value: Pointee, sizes: Mapping[str, int]) -> int | Ints:
        """Of what the field shall point to. Raises ValueError for another kind of element, for elements that don't lie
        one behind the other (`step`: rows of them), and for too few."""
        one = value.first if isinstance(value, Along) else value
        if isinstance(one, torch.Tensor):
            if one.dtype in self._torch and one.is_cpu and self._lies_well(one, sizes):
                return one.data_ptr() if one is value else value.addresses  # type: ignore[union-attr]
        elif one.dtype in self._numpy and one.flags.c_contiguous and one.size >= self._count(sizes):
            return one.ctypes.data if one is value else value.addresses  # type: ignore[union-attr]
        raise ValueError(
            f"{self.name} points to {self._kind} {self._shape(sizes)} one behind the other, not to {_told(one)}"
        )

    def _shape(self, sizes: Mapping[str, int]) -> list[int]:
        return [size if isinstance(size, int) else sizes[size] for size in self.shape]

    def _count(self, sizes: Mapping[str, int]) -> int:
        count = self._constant
        for name in self._names:
            count *= sizes[name]
        return count

    def _lies_well(self, value: torch.Tensor, sizes: Mapping[str, int]) -> bool:
        if self.step is None:
            return value.is_contiguous() and value.numel() >= self._count(sizes)
        needed, shape, steps = self._shape(sizes), value.shape, value.stride()
        if len(shape) != len(needed) or shape[0] < needed[0]:
            return False
        behind = 1
        for place in range(len(needed) - 1, 0, -1):
            size = shape[place]
            if size != needed[place] or (size != 1 and steps[place] != behind):
                return False
            behind *= size
        return True

    @property
    def _kind(self) -> str:
        return self.element.name if isinstance(self.element, Element) else str(self.element)


def integer() -> Any:
    """A field that holds an integer."""
    return Field(None, (), None)


def pointer(element: Element | type[Struct], *shape: str | int, step: str | None = None) -> Any:
    """A field that holds the address of elements [shape]: numbers, or names of integer fields and of other sizes that
    the writer is given. With `step`, the field of that name says how many elements its rows are apart."""
    return Field(element, shape, step)


class Struct:
    """A kind of struct: its class attributes are its fields, in their order."""

    dtype: ClassVar[np.dtype[Any]]
    fields: ClassVar[dict[str, Field]]

    def __init_subclass__(cls) -> None:
        cls.fields = {name: field for name, field in vars(cls).items() if isinstance(field, Field)}
        for place, (name, field) in enumerate(cls.fields.items()):
            field.name, field.place = name, place
        cls.dtype = np.dtype([(name, np.int64) for name in cls.fields])

    @classmethod
    def zeros(cls, *shape: int) -> Structs:
        """So many, of which all fields are 0."""
        return np.zeros(shape, dtype=cls.dtype)

    @classmethod
    def fill(cls, structs: Structs, sizes: Mapping[str, int] | None = None, **values: int | Ints | Pointee) -> Structs:
        """Write fields of all `structs`, which are returned: integers first, since shapes go by them and by `sizes`.
        Raises ValueError, before anything is read, for what a pointer may not point to."""
        known = _Sizes(sizes or ())
        known.structs = structs
        pointers = []
        for name, value in values.items():
            field = cls.fields[name]
            if field.element is None:
                structs[name] = value
                if isinstance(value, int):
                    known[name] = value
            else:
                pointers.append((field, value))
        for field, value in pointers:
            structs[field.name] = field.address(value, known)  # type: ignore[arg-type]
            if field.step is not None:
                structs[field.step] = (value.first if isinstance(value, Along) else value).stride(0)  # type: ignore
        return structs


class _Sizes(dict[str, int]):
    """Sizes by name: those given, and what integer fields hold, the largest of several."""

    structs: Structs

    def __missing__(self, name: str) -> int:
        self[name] = found = int(self.structs[name].max(initial=0))
        return found


class Call(Struct):
    """A function of a pointer to a struct, and the struct: addresses."""

    function = integer()
    struct = integer()


def joined(arrays: Sequence[Structs]) -> Structs:
    """Contiguous arrays of one struct behind each other along their last dimension. numpy does structs one by one."""
    found: Structs = np.concatenate([array.view(np.int64) for array in arrays], axis=-1).view(arrays[0].dtype)
    return found


def addresses(whole: npt.NDArray[Any]) -> Ints:
    """Where each row of an array begins."""
    return whole.ctypes.data + whole.strides[0] * np.arange(len(whole))


def _told(value: torch.Tensor | npt.NDArray[Any]) -> str:
    steps = value.stride() if isinstance(value, torch.Tensor) else value.strides
    return f"{value.dtype} {list(value.shape)} with steps {list(steps)}"
