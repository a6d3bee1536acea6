"""What a layer does to each token's row by itself, in one pass over it: the root-mean-square norm, the rotation of
queries and keys, and the choice of some rows. As torch's own operations they are a dozen small ones in every layer."""

from __future__ import annotations

from functools import lru_cache

import torch
from llvmlite import ir

from lookonce.models.kernels.code import Code
from lookonce.models.kernels.compiling import Compiled, compiled_or_none, lanes_for
from lookonce.models.kernels.program import run
from lookonce.models.kernels.structs import FLOAT32, INT64, Struct, address, integer, pointer

_CHUNK = 8  # rows that a thread takes at once
_SINGLE_THREADED = 1 << 14  # float32 up to which other threads don't pay


class Norm(Struct):
    """out = source / sqrt(mean(source^2) + epsilon) * weight, row by row."""

    counter = integer()  # starts at zero
    rows = integer()
    source = pointer(FLOAT32, "rows", "hidden")
    weight = pointer(FLOAT32, "hidden")
    out = pointer(FLOAT32, "rows", "hidden")


class Rotation(Struct):
    """Rotary embedding of each row's heads, in place; the two halves of a head are the two coordinates."""

    counter = integer()
    rows = integer()
    heads = pointer(FLOAT32, "rows", "rotated", "head_dim", step="step")
    step = integer()
    cos = pointer(FLOAT32, "rows", "half")
    sin = pointer(FLOAT32, "rows", "half")


class Gather(Struct):
    """out = source[which]."""

    counter = integer()
    rows = integer()
    source = pointer(FLOAT32, "tokens", "hidden")  # of the step
    which = pointer(INT64, "rows")
    out = pointer(FLOAT32, "rows", "hidden")


class TextRows:
    """For rows of float32 on the CPU; called from one thread at a time."""

    def __init__(self, hidden: int, head_dim: int, rotated: int, epsilon: float) -> None:
        """Rows of `hidden` places are normed; of each token the first `rotated` heads of `head_dim` are rotated."""
        self.code = _compiled(hidden, head_dim, rotated, epsilon)
        self._norm, self._rotate = self.code.task("norm"), self.code.task("rotate")
        self._norm_struct, self._rotation_struct = Norm.one(), Rotation.one()
        self._addresses = address(self._norm_struct), address(self._rotation_struct)
        self.sizes = {"hidden": hidden, "rotated": rotated, "head_dim": head_dim, "half": head_dim // 2}

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] / sqrt(mean(x^2) + epsilon) * weight [hidden]."""
        x = x.contiguous()
        out = torch.empty_like(x)
        Norm.fill(self._norm_struct, self.sizes, counter=0, rows=x.shape[0], source=x, weight=weight, out=out)
        run(self._norm, self._addresses[0], single_threaded=x.numel() <= _SINGLE_THREADED)
        return out

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotary embedding of `heads` [T, rotated, d], in place; each token's lie one behind the other. Cosines and
        sines are [T, 1, d / 2]."""
        cos, sin = cos.contiguous(), sin.contiguous()
        rows = heads.shape[0]
        Rotation.fill(self._rotation_struct, self.sizes, counter=0, rows=rows, heads=heads, cos=cos, sin=sin)
        run(self._rotate, self._addresses[1], single_threaded=heads.numel() <= _SINGLE_THREADED)


@lru_cache
def _compiled(hidden: int, head_dim: int, rotated: int, epsilon: float) -> Compiled:
    def write(module: ir.Module) -> None:
        _write_norm(module, hidden, epsilon)
        _write_rotation(module, head_dim // 2, rotated)
        _write_gather(module, hidden)

    return Compiled(write)


def _write_norm(module: ir.Module, hidden: int, epsilon: float) -> None:
    code = Code(module, "norm", 1, lanes_for(hidden))
    struct, build = code.function.args[0], code.build
    source, out, weight = (code.field(struct, field) for field in (Norm.source, Norm.out, Norm.weight))
    sums = [code.variable(code.vector) for _ in range(4)]
    together = 4 if hidden % (4 * code.lanes) == 0 else 1  # sums that needn't wait for each other
    with code.shared_rows(struct, Norm.counter, code.field(struct, Norm.rows), _CHUNK) as row:
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
    struct, build = code.function.args[0], code.build
    rows, step, cosines, sines = (
        code.field(struct, field) for field in (Rotation.heads, Rotation.step, Rotation.cos, Rotation.sin)
    )
    with code.shared_rows(struct, Rotation.counter, code.field(struct, Rotation.rows), _CHUNK) as token:
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
    struct = code.function.args[0]
    source, out, which = (code.field(struct, field) for field in (Gather.source, Gather.out, Gather.which))
    with code.shared_rows(struct, Gather.counter, code.field(struct, Gather.rows), _CHUNK) as row:
        line = code.at(source, code.times(code.integer(which, row), hidden))
        target = code.at(out, code.times(row, hidden))
        with code.loop(hidden, step=code.lanes) as place:
            code.put(code.row(line, place), target, place)
    code.end()


def rows_for(hidden: int, head_dim: int, rotated: int, epsilon: float) -> TextRows | None:
    """Kernels for such rows; None where there are none."""
    if hidden % 4 or head_dim % 8:
        return None
    return compiled_or_none(lambda: TextRows(hidden, head_dim, rotated, epsilon))
