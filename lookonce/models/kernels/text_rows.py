"""What a layer does to each token's row by itself, in one pass over it: the root-mean-square norm, the rotation of
queries and keys, and the choice of some rows. As torch's own operations they are a dozen small ones in every layer."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from llvmlite import ir

from lookonce.models.kernels.code import Code
from lookonce.models.kernels.compiling import Compiled, compiled_or_none, lanes_for
from lookonce.models.kernels.omp_team import run

_PIECE = 8  # rows that a thread takes at once
_ALONE = 1 << 14  # float32 up to which other threads don't pay


class Field(IntEnum):
    """What the kernels' table holds at each place. Pointers are addresses."""

    COUNTER = 0
    ROWS = 1
    STEP = 2  # float32 from one row to the next
    ROW = 3  # pointer to the first
    OUT = 4
    WEIGHT = 5  # of `gather`: int64 [ROWS], which rows
    COS = 6
    SIN = 7


class RowKernels:
    """For rows of float32 on the CPU."""

    def __init__(self, hidden: int, head_dim: int, rotated: int, epsilon: float) -> None:
        """Rows of `hidden` places are normed; of each token the first `rotated` heads of `head_dim` are rotated."""
        code = _compiled(hidden, head_dim, rotated, epsilon)
        self._norm, self._rotate = code.task("norm"), code.task("rotate")
        self.code = code
        self._turned = head_dim * rotated
        self._table = np.zeros(len(Field), dtype=np.int64)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] / sqrt(mean(x^2) + epsilon) * weight [hidden]."""
        x = x.contiguous()
        out, table = torch.empty_like(x), self._table
        table[: Field.COS] = 0, *x.shape, x.data_ptr(), out.data_ptr(), weight.data_ptr()
        run(self._norm, table.ctypes.data, alone=x.numel() <= _ALONE)
        return out

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotary embedding of the first heads of `heads` [T, n, d], in place; each token's lie in one piece. The two
        halves of a head are the two coordinates; cosines and sines are [T, 1, d / 2]."""
        table, count, cos, sin = self._table, heads.shape[0], cos.contiguous(), sin.contiguous()
        table[:] = 0, count, heads.stride(0), heads.data_ptr(), 0, 0, cos.data_ptr(), sin.data_ptr()
        run(self._rotate, table.ctypes.data, alone=count * self._turned <= _ALONE)


@lru_cache
def _compiled(hidden: int, head_dim: int, rotated: int, epsilon: float) -> Compiled:
    def write(module: ir.Module) -> None:
        _write_norm(module, hidden, epsilon)
        _write_rotation(module, head_dim // 2, rotated)
        _write_gather(module, hidden)

    return Compiled(write)


def _write_norm(module: ir.Module, hidden: int, epsilon: float) -> None:
    code = Code(module, "norm", 1, lanes_for(hidden))
    fields, build = code.function.args[0], code.build
    source, out, weight = (code.address(fields, field) for field in (Field.ROW, Field.OUT, Field.WEIGHT))
    sums = [code.variable(code.vector) for _ in range(4)]
    together = 4 if hidden % (4 * code.lanes) == 0 else 1  # sums that needn't wait for each other
    with code.shared_rows(fields, Field.COUNTER, code.integer(fields, Field.ROWS), _PIECE) as row:
        begin = code.times(row, hidden)
        line, target = code.at(source, begin), code.at(out, begin)
        for total in sums[:together]:
            code.set(total, code.constant(0.0, code.vector))
        with code.loop(hidden, step=together * code.lanes) as place:
            for number, total in enumerate(sums[:together]):
                value = code.row(line, code.plus(place, number * code.lanes))
                code.set(total, code.multiply_add(value, value, code.get(total, code.vector)))
        total = code.get(sums[0], code.vector)
        for other in sums[1:together]:
            total = build.fadd(total, code.get(other, code.vector))
        mean = code.multiply_add(code.total(total), code.constant(1 / hidden), code.constant(epsilon))
        scale = code.spread(build.fdiv(code.constant(1.0), code.root(mean)))
        with code.loop(hidden, step=code.lanes) as place:
            code.put(build.fmul(build.fmul(code.row(line, place), scale), code.row(weight, place)), target, place)
    code.end()


def _write_rotation(module: ir.Module, half: int, rotated: int) -> None:
    code = Code(module, "rotate", 1, lanes_for(half))
    fields, build = code.function.args[0], code.build
    rows, step = code.address(fields, Field.ROW), code.integer(fields, Field.STEP)
    cosines, sines = code.address(fields, Field.COS), code.address(fields, Field.SIN)
    with code.shared_rows(fields, Field.COUNTER, code.integer(fields, Field.ROWS), _PIECE) as token:
        angle, begin = code.times(token, half), code.times(token, step)
        for place in range(0, half, code.lanes):
            cos, sin = (code.row(table, code.plus(angle, place)) for table in (cosines, sines))
            with code.loop(rotated) as head:
                at = code.plus(begin, code.times(head, 2 * half), place)
                first, second = code.row(rows, at), code.row(rows, code.plus(at, half))
                turned = build.fneg(build.fmul(second, sin))
                code.put(code.multiply_add(first, cos, turned), rows, at)
                code.put(code.multiply_add(second, cos, build.fmul(first, sin)), rows, code.plus(at, half))
    code.end()


def _write_gather(module: ir.Module, hidden: int) -> None:
    code = Code(module, "gather", 1, lanes_for(hidden))
    fields = code.function.args[0]
    source, out, which = (code.address(fields, field) for field in (Field.ROW, Field.OUT, Field.WEIGHT))
    with code.shared_rows(fields, Field.COUNTER, code.integer(fields, Field.ROWS), _PIECE) as row:
        line = code.at(source, code.times(code.integer(which, row), hidden))
        target = code.at(out, code.times(row, hidden))
        with code.loop(hidden, step=code.lanes) as place:
            code.put(code.row(line, place), target, place)
    code.end()


def rows_for(hidden: int, head_dim: int, rotated: int, epsilon: float, like: torch.Tensor) -> RowKernels | None:
    """Kernels for rows such as `like`; None where there are none."""
    if like.device.type != "cpu" or like.dtype != torch.float32 or hidden % 4 or head_dim % 8:
        return None
    return compiled_or_none(lambda: RowKernels(hidden, head_dim, rotated, epsilon))
