"""What a format is: the tensors that a library keeps of one matrix, and how its rows are computed from them. No torch.

A matrix is what its tensors are. Modules that a config lists as left alone (modules_to_not_convert, ignore) are stored
as plain weights, and read as such.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.headers import TensorEntry

if TYPE_CHECKING:
    import torch

WEIGHT, BIAS = "weight", "bias"
Parts = Mapping[str, TensorEntry]
"""The tensors of a matrix, by what their names end with: "qweight", "scales"."""


class Matrix(Protocol):
    """How one matrix is stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, inputs."""

    @property
    def label(self) -> str:
        """What its values are stored as: "int4"."""

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """Float32 [stop - start, inputs], from the tensors as stored, on the CPU; `start` is a multiple of 64. Raises
        ValueError for tensors that contradict each other."""


class Format(Protocol):
    """A library's way to store matrices, as a config sets it."""

    @property
    def name(self) -> str:
        """For people: "GPTQ"."""

    @property
    def endings(self) -> Collection[str]:
        """What the names of a matrix's tensors may end with."""

    @property
    def unused(self) -> Collection[str]:
        """Endings of tensors that no weight is computed from, such as scales of activations."""

    def matrix(self, parts: Parts) -> Matrix:
        """Raises ValueError saying what is wrong with the tensors' names, dtypes or shapes."""


@dataclass(frozen=True)
class QuantisedEntry:
    """One matrix of a checkpoint that is stored quantised: in the place that a `TensorEntry` has for a plain one."""

    format: str
    matrix: Matrix
    parts: dict[str, TensorEntry] = field(repr=False)

    @property
    def first(self) -> TensorEntry:
        """The part that stands for all in messages."""
        return next(iter(self.parts.values()))

    @property
    def stored_name(self) -> str:
        """Of the first part."""
        return self.first.stored_name

    @property
    def file(self) -> Path:
        """Of the first part."""
        return self.first.file

    @property
    def offset(self) -> int:
        """Of the first part."""
        return self.first.offset

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix in plain weights."""
        return self.matrix.shape

    @property
    def nbytes(self) -> int:
        """As stored, scales and all."""
        return sum(part.nbytes for part in self.parts.values())


StoredWeight = TensorEntry | QuantisedEntry


def assembled(format: Format | None, entries: Mapping[str, TensorEntry]) -> dict[str, StoredWeight]:
    """A half's weights by their names in the module: the quantised ones put together, the plain ones as they are.

    Raises CheckpointError naming the first matrix whose tensors don't make one.
    """
    if format is None:
        return dict(entries)
    groups: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        stem, ending = cut(name, format.endings)
        groups.setdefault(stem if ending else name, {})[ending] = entry
    weights: dict[str, StoredWeight] = {}
    for stem, parts in groups.items():
        if parts.keys() <= {"", WEIGHT}:  # plain
            weights |= {f"{stem}.{ending}" if ending else stem: entry for ending, entry in parts.items()}
        elif not parts.keys() <= set(format.unused):
            weights[f"{stem}.{WEIGHT}"] = QuantisedEntry(format.name, _matrix(format, parts), parts)
    return weights


def require(parts: Parts, ending: str, dtypes: Iterable[str], dimensions: int | None = None) -> TensorEntry:
    """A tensor of a matrix. Raises ValueError when it is not there, or of another dtype or number of dimensions."""
    entry = parts.get(ending)
    if entry is None:
        raise ValueError(f"has no {ending} beside it")
    if entry.dtype not in dtypes:
        raise ValueError(f"has a {ending} stored as {entry.dtype}, not {' or '.join(dtypes)}")
    if dimensions is not None and len(entry.shape) != dimensions:
        raise ValueError(f"has a {ending} of shape {list(entry.shape)}, not of {dimensions} dimensions")
    return entry


def cut(name: str, endings: Collection[str]) -> tuple[str, str]:
    """Stem and ending of a tensor's name; no ending for one that no matrix has."""
    found = max((ending for ending in endings if name.endswith(f".{ending}")), key=len, default="")
    return (name[: -len(found) - 1], found) if found else (name, "")


def _matrix(format: Format, parts: Parts) -> Matrix:
    try:
        return format.matrix(parts)
    except ValueError as error:
        entry = next(iter(parts.values()))
        raise CheckpointError(
            f"{entry.file}: tensor {entry.stored_name!r} {error}, as {format.name} would have it; "
            "take config.json and all weights from the same repository and revision"
        ) from None
