"""What kernels are told, declared once: the writer in Python takes a struct's fields by name and checks what they point
to, the reader in LLVM's code (`Code.field`) takes their places from the same declaration.

Every field is eight bytes: an integer, or a pointer to elements of one kind in a declared shape.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Structs = npt.NDArray[Any]
"""Of a struct's dtype, any shape."""
Words: TypeAlias = "array[int]"
"""One struct: its fields in their order. numpy takes ten times as long to copy or write one."""
T = TypeVar("T", Structs, Words)


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
        self._behind = list(enumerate(shape))[:0:-1]  # dimensions of a row, the last first
        kinds = element.numpy if isinstance(element, Element) else () if element is None else (element.dtype,)
        self._numpy, self._torch = kinds, element.torch if isinstance(element, Element) else ()

    def address(self, value: Pointee, sizes: Mapping[str, int]) -> int | Ints:
        """Of what the field shall point to. Raises ValueError for another kind of element, for elements that don't lie
        one behind the other (`step`: rows of them), and for too few."""
        if isinstance(value, torch.Tensor):
            if self._takes(value, sizes):
                return value.data_ptr()
        elif isinstance(value, Along):
            if isinstance(value.first, torch.Tensor):
                if self._takes(value.first, sizes):
                    return value.addresses
            elif self._takes_array(value.first, sizes):
                return value.addresses
        elif self._takes_array(value, sizes):
            return address(value)
        one = value.first if isinstance(value, Along) else value
        raise ValueError(
            f"{self.name} points to {self._kind} {self._shape(sizes)} one behind the other, not to {_told(one)}"
        )

    def _takes(self, value: torch.Tensor, sizes: Mapping[str, int]) -> bool:
        if value.dtype not in self._torch or not value.is_cpu:
            return False
        if self.step is not None:
            return self._rows_lie_well(value, sizes)
        return value.is_contiguous() and value.numel() >= self._count(sizes)

    def _takes_array(self, value: npt.NDArray[Any], sizes: Mapping[str, int]) -> bool:
        return value.dtype in self._numpy and value.flags.c_contiguous and value.size >= self._count(sizes)

    def _shape(self, sizes: Mapping[str, int]) -> list[int]:
        return [size if isinstance(size, int) else sizes[size] for size in self.shape]

    def _count(self, sizes: Mapping[str, int]) -> int:
        count = self._constant
        for name in self._names:
            count *= sizes[name]
        return count

    def _rows_lie_well(self, value: torch.Tensor, sizes: Mapping[str, int]) -> bool:
        shape, steps, rows = value.shape, value.stride(), self.shape[0]
        if len(shape) != len(self.shape) or shape[0] < (sizes[rows] if isinstance(rows, str) else rows):
            return False
        behind = 1
        for place, needed in self._behind:
            size = shape[place]
            if size != (sizes[needed] if isinstance(needed, str) else needed) or (size != 1 and steps[place] != behind):
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
    def one(cls) -> Words:
        """One, of which all fields are 0."""
        return array("q", bytes(cls.dtype.itemsize))

    @classmethod
    def zeros(cls, *shape: int) -> Structs:
        """So many, of which all fields are 0."""
        return np.zeros(shape, dtype=cls.dtype)

    @classmethod
    def fill(cls, structs: T, sizes: Mapping[str, int] | None = None, **values: int | Ints | Pointee) -> T:
        """Write fields of one struct, or of all `structs`, which are returned: integers first, since shapes go by them
        and by `sizes`. Raises ValueError, before anything is read, for what a pointer may not point to."""
        fields, known = cls.fields, _Sizes(sizes or ())
        known.kind, known.structs, pointers = cls, structs, []
        target: Any = structs
        single = isinstance(structs, array)
        for name, value in values.items():
            field = fields[name]
            if field.element is not None:
                pointers.append((field, value))
                continue
            target[field.place if single else name] = value
            if isinstance(value, int):
                known[name] = value
        for field, pointee in pointers:
            target[field.place if single else field.name] = field.address(pointee, known)  # type: ignore[arg-type]
            if field.step is not None:
                one: Any = pointee.first if isinstance(pointee, Along) else pointee
                target[fields[field.step].place if single else field.step] = one.stride()[0]
        return structs


class _Sizes(dict[str, int]):
    """Sizes by name: those given, and what integer fields hold, the largest of several."""

    __slots__ = ("kind", "structs")
    kind: type[Struct]
    structs: Structs | Words

    def __missing__(self, name: str) -> int:
        structs = self.structs
        if isinstance(structs, array):
            self[name] = found = structs[self.kind.fields[name].place]
        else:
            self[name] = found = int(structs[name].max(initial=0))
        return found


class Call(Struct):
    """A function of a pointer to a struct, and the struct: addresses."""

    function = integer()
    struct = integer()


def stacked(kind: type[Struct], structs: Sequence[Words]) -> Structs:
    """[n] of so many single ones, copied."""
    return np.array([tuple(struct) for struct in structs], dtype=kind.dtype)


def joined(arrays: Sequence[Structs]) -> Structs:
    """Contiguous arrays of one struct behind each other along their last dimension. numpy does structs one by one."""
    first = arrays[0]
    if len(arrays) == 1:
        return np.ndarray(first.shape, first.dtype, bytearray(first.tobytes()))
    found: Structs = np.concatenate([array.view(np.int64) for array in arrays], axis=-1).view(first.dtype)
    return found


def calls_of(kernels: Sequence[tuple[int, Structs]]) -> Structs:
    """Of kernels, each a function with structs [n]: Call [n, kernels]."""
    calls = Call.zeros(len(kernels[0][1]), len(kernels))
    for number, (function, structs) in enumerate(kernels):
        calls["function"][:, number], calls["struct"][:, number] = function, addresses(structs)
    return calls


def address(memory: npt.NDArray[Any] | Words) -> int:
    """Where one struct or a contiguous array begins; 0 for an empty one. numpy's `ctypes` takes several times as
    long."""
    if isinstance(memory, array):
        return memory.buffer_info()[0]
    if not memory.size:
        return 0
    try:
        return addressof(c_char.from_buffer(memory))  # type: ignore[arg-type]
    except TypeError:  # it is read-only
        return memory.ctypes.data


def addresses(whole: npt.NDArray[Any]) -> Ints:
    """Where each row of an array begins."""
    if len(whole) == 1:
        return np.array([address(whole)])
    return np.arange(len(whole)) * whole.strides[0] + address(whole)


def _told(value: torch.Tensor | npt.NDArray[Any]) -> str:
    steps = value.stride() if isinstance(value, torch.Tensor) else value.strides
    return f"{value.dtype} {list(value.shape)} with steps {list(steps)}"
