"""AWQ (arXiv:2306.00978) as AutoAWQ stores it. A value is scale * (q - zero) in all layouts.

"gemm", of a matrix of so many outputs and inputs: `qweight` int32 [inputs, outputs / 8], `qzeros` int32 [groups,
outputs / 8], `scales` [groups, outputs]. The fields of a word, lowest bits first, are outputs 0, 2, 4, 6, 1, 3, 5, 7.

"gemv": `qweight` int32 [outputs, inputs / 8], in order; `qzeros` int32 [outputs, padded groups / 8], `scales` [outputs,
padded groups]. "gemv_fast": `qweight` int16 [outputs / 4, inputs] of interleaved rows, `scales` and `qzeros` float16
[padded groups, outputs], the latter -scale * zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lookonce.models.checkpoint.quantised.matrix import Matrix, Parts, require

if TYPE_CHECKING:
    import torch

ENDINGS = frozenset({"qweight", "qzeros", "scales"})
_PER_WORD = 8
_FIELD_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which field of a word an output is in."""
_GEMM = ("gemm", "exllama", "ipex")
"""Versions that differ in the kernel only."""
_ROWS, _BLOCK = 4, 64
"""Rows that gemv_fast interleaves, and inputs of each before the next row's."""
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class AwqMatrix:
    """See `Matrix`."""

    shape: tuple[int, int]
    groups: int
    label = "int4"

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        from lookonce.models.checkpoint.quantised.arithmetic import groups_of

        words = slice(start // _PER_WORD, -(-stop // _PER_WORD))
        group = groups_of(None, self.shape[1], self.groups, -(-self.shape[1] // self.groups))
        values, zeros = _in_order(parts["qweight"][:, words]), _in_order(parts["qzeros"][:, words])
        scales = parts["scales"][:, start:stop].float()
        return (values.sub_(zeros[group]).float().mul_(scales[group])).t()


@dataclass(frozen=True)
class GemvMatrix:
    """See `Matrix`."""

    shape: tuple[int, int]
    groups: int
    size: int  # inputs of a group
    label = "int4"

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        from lookonce.models.checkpoint.quantised.arithmetic import unpacked

        values, zeros = (unpacked(parts[name][start:stop], 4, 1) for name in ("qweight", "qzeros"))
        grouped = values.view(stop - start, self.groups, self.size).sub_(zeros[:, : self.groups, None])
        scales = parts["scales"][start:stop, : self.groups].float()
        return grouped.float().mul_(scales[:, :, None]).view(stop - start, self.shape[1])


@dataclass(frozen=True)
class GemvFastMatrix:
    """See `Matrix`."""

    shape: tuple[int, int]
    groups: int
    size: int  # inputs of a group
    label = "int4"

    def rows(self, parts: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        values = _rows_apart(parts["qweight"][start // _ROWS : stop // _ROWS]).view(
            stop - start, self.groups, self.size
        )
        scales, zeros = (parts[name][: self.groups, start:stop].t().float() for name in ("scales", "qzeros"))
        return values.mul_(scales[:, :, None]).add_(zeros[:, :, None]).view(stop - start, self.shape[1])


@dataclass(frozen=True)
class Awq:
    """See `Format`."""

    version: str
    size: int  # inputs of a group; less than 1: all
    name = "AWQ"
    endings = ENDINGS
    unused = frozenset[str]()

    def matrix(self, parts: Parts) -> Matrix:
        if self.version in _GEMM:
            return _gemm(parts)
        fast = self.version == "gemv_fast"
        weight = require(parts, "qweight", ("I16" if fast else "I32",), 2)
        scales = require(parts, "scales", _FLOATS, 2).shape
        zeros = require(parts, "qzeros", _FLOATS if fast else ("I32",), 2).shape
        rows, columns = weight.shape
        outputs, inputs = (rows * _ROWS, columns) if fast else (rows, columns * _PER_WORD)
        size = self.size if self.size > 0 else inputs
        groups, rest = divmod(inputs, size)
        padded = scales[0] if fast else scales[1]
        expected = ((padded, outputs),) * 2 if fast else ((outputs, padded), (outputs, padded // _PER_WORD))
        if (scales, zeros) != expected or rest or not groups <= padded or (fast and inputs % _BLOCK):
            raise ValueError(
                f"of shape {[rows, columns]} has scales of shape {list(scales)} and qzeros of {list(zeros)}, "
                f"with a group_size of {size}"
            )
        return (GemvFastMatrix if fast else GemvMatrix)((outputs, inputs), groups, size)


def format_of(settings: Mapping[str, Any]) -> Awq:
    """See `formats`."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise ValueError(f"bits {bits!r} is not supported (4)")
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version not in (*_GEMM, "gemv", "gemv_fast"):
        raise ValueError(f"version {version!r} is not supported ({', '.join(_GEMM)}, gemv, gemv_fast)")
    return Awq(version, int(settings.get("group_size", settings.get("q_group_size")) or 128))


def _gemm(parts: Parts) -> AwqMatrix:
    inputs, words = require(parts, "qweight", ("I32",), 2).shape
    groups, outputs = require(parts, "scales", _FLOATS, 2).shape
    zeros = require(parts, "qzeros", ("I32",), 2).shape
    if outputs != words * _PER_WORD or zeros != (groups, words) or not groups or inputs % groups:
        raise ValueError(
            f"of shape {[inputs, words]} has scales of shape {[groups, outputs]} and qzeros of {list(zeros)}"
        )
    return AwqMatrix((outputs, inputs), groups)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """Int32 [n, outputs] of words [n, outputs / 8]."""
    import torch

    shifts = torch.tensor([4 * field for field in _FIELD_OF], dtype=torch.int32)
    return ((words.unsqueeze(2) >> shifts).bitwise_and_(15)).reshape(words.shape[0], -1)


def _rows_apart(words: torch.Tensor) -> torch.Tensor:
    """Float32 [4 n, inputs] of gemv_fast's int16 words [n, inputs].

    A block of 64 words holds 64 inputs of each of four rows, row after row. Of 32 inputs, pairs (0, 1), (8, 9), (16,
    17), (24, 25), (2, 3) ... follow each other, and of each eight so ordered the first ones of pairs come first.
    """
    import torch

    fields = (words.int().unsqueeze(2) >> torch.arange(0, 16, 4, dtype=torch.int32)).bitwise_and_(15)
    rows = fields.view(len(words), -1, _ROWS, _BLOCK).transpose(1, 2).reshape(_ROWS * len(words), -1, 32)
    order = torch.arange(32).view(4, 4, 2).transpose(0, 1).reshape(4, 4, 2).transpose(1, 2).reshape(32)
    return rows[:, :, order.argsort()].float().view(_ROWS * len(words), -1)
