"""Attention of a packed batch, each picture's patches among themselves, written for one size of heads.

Two kernels, one after the other: `lay` rotates queries and keys and puts each head's in one piece, `look` attends. They
take work from counters in a table (`Field`) until there is none, so that any number of threads may run them at once. A
picture's numbers depend neither on its company nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from llvmlite import ir

from lookonce.models.kernels.code import INT, LOG2_E, POINTER, Code, Value
from lookonce.models.kernels.compiling import lanes_for
from lookonce.models.kernels.queries import Queries

_PIECE = 8  # patches that a thread lays at once


class Field(IntEnum):
    """What the table holds at each place. Sizes count elements, pointers are addresses."""

    LAY_COUNTER = 0  # both counters start at zero
    LOOK_COUNTER = 1
    PATCHES = 2
    QKV = 3  # pointer to float32 [patches, 3, heads, d]
    COS = 4  # float32 [patches, d / 2]
    SIN = 5
    LAID = 6  # float32 [3, heads, PLANE]: queries, scaled and rotated, keys, rotated, and values, each [patches, d]
    PLANE = 7
    OUT = 8  # float32 [patches, heads, d]
    BLOCKS = 9  # int64 [COUNT, len(Block)]
    COUNT = 10
    BARRIER = 11  # pointer to a function that returns when all threads have called it; 0 for a lone thread


class Block(IntEnum):
    """Patches [ROW, ROW + ROWS) attend to the patches [BEGIN, END) of their picture."""

    BEGIN = 0
    END = 1
    ROW = 2
    ROWS = 3


@dataclass(frozen=True)
class Heads:
    """`count` heads of `size` places, in vectors of `lanes`, up to `vectors` of them side by side."""

    size: int
    count: int
    lanes: int
    vectors: int

    @property
    def block(self) -> int:
        """Rows of a block, at most."""
        return self.lanes * self.vectors


def write_attention(module: ir.Module, heads: Heads) -> None:
    """Write both kernels as the function `attend` of a pointer to the table, and `attend_laid`, which is `look` alone:
    of further blocks of what is laid already."""
    lay, look = _write_lay(module, heads), _write_look(module, heads)
    for name, functions in (("attend", (lay, look)), ("attend_laid", (look,))):
        code = Code(module, name, 1, heads.lanes)
        code.call_in_turn(functions, code.function.args[0], Field.BARRIER)
        code.end()


def _write_lay(module: ir.Module, heads: Heads) -> ir.Function:
    half = heads.size // 2
    code = Code(module, "lay", 1, lanes_for(half))
    code.function.linkage = "internal"
    fields, build = code.function.args[0], code.build
    laid, plane = code.address(fields, Field.LAID), code.integer(fields, Field.PLANE)
    source, cosines, sines = (code.address(fields, field) for field in (Field.QKV, Field.COS, Field.SIN))
    scale = code.constant(heads.size**-0.5 * LOG2_E, code.vector)
    with code.shared_rows(fields, Field.LAY_COUNTER, code.integer(fields, Field.PATCHES), _PIECE) as patch:
        angle, begin = code.times(patch, half), code.times(patch, 3 * heads.count * heads.size)
        for part, factor in enumerate((scale, None)):
            for place in range(0, half, code.lanes):
                cos, sin = (code.row(table, code.plus(angle, place)) for table in (cosines, sines))
                if factor is not None:
                    cos, sin = build.fmul(cos, factor), build.fmul(sin, factor)
                with code.loop(heads.count) as head:
                    number = code.plus(head, part * heads.count)
                    come = code.plus(begin, code.times(number, heads.size), place)
                    go = code.plus(code.times(number, plane), code.times(patch, heads.size), place)
                    first, second = code.row(source, come), code.row(source, code.plus(come, half))
                    turned = build.fneg(build.fmul(second, sin))
                    code.put(code.multiply_add(first, cos, turned), laid, go)
                    code.put(code.multiply_add(second, cos, build.fmul(first, sin)), laid, code.plus(go, half))
        with code.loop(3 * heads.count, 2 * heads.count) as number:
            come = code.plus(begin, code.times(number, heads.size))
            go = code.plus(code.times(number, plane), code.times(patch, heads.size))
            for place in range(0, heads.size, code.lanes):
                code.put(code.row(source, code.plus(come, place)), laid, code.plus(go, place))
    code.end()
    return code.function


def _write_look(module: ir.Module, heads: Heads) -> ir.Function:
    """Pieces of work are blocks of one head, then of the next: keys and values stay near while they are needed."""
    looks = [_write_block(module, heads, vectors) for vectors in range(1, heads.vectors + 1)]
    code = Code(module, "look", 1, heads.lanes)
    code.function.linkage = "internal"
    fields, build = code.function.args[0], code.build
    count = code.integer(fields, Field.COUNT)
    with code.work(code.place(fields, Field.LOOK_COUNTER), code.times(count, heads.count)) as number:
        head = code.over(number, count)
        block = code.place(code.address(fields, Field.BLOCKS), code.times(code.rest(number, count), len(Block)))
        vectors = code.over(code.plus(code.integer(block, Block.ROWS), heads.lanes - 1), heads.lanes)
        for width, function in enumerate(looks, 1):
            with build.if_then(build.icmp_signed("==", vectors, code.whole(width))):
                build.call(function, [fields, block, head])
    code.end()
    return code.function


def _write_block(module: ir.Module, heads: Heads, vectors: int) -> ir.Function:
    """One block of up to `vectors` vectors of rows: (fields, block, number of the head)."""
    code = Code(module, f"look_{vectors}", (POINTER, POINTER, INT), heads.lanes)
    code.function.linkage = "internal"
    fields, block, head = code.function.args
    laid, plane = code.address(fields, Field.LAID), code.integer(fields, Field.PLANE)
    query, key, value = (
        code.at(laid, code.times(code.plus(head, part * heads.count), plane)) for part in range(3)
    )  # each [patches, d]
    first, count = code.integer(block, Block.ROW), code.integer(block, Block.ROWS)
    out = code.at(code.address(fields, Field.OUT), code.times(head, heads.size))

    def query_row(row: Value) -> Value:
        """Rows behind the last repeat it."""
        at = code.plus(first, code.least(row, code.minus(count, 1)))
        return code.at(query, code.times(at, heads.size))

    def out_row(row: Value) -> Value:
        """Rows behind the last are the same numbers once more."""
        at = code.plus(first, code.least(row, code.minus(count, 1)))
        return code.at(out, code.times(at, heads.count * heads.size))

    queries = Queries(code, heads.size, vectors)
    queries.lay(query_row)
    queries.look(key, value, code.integer(block, Block.BEGIN), code.integer(block, Block.END))
    queries.take(out_row, divided=True)
    code.end()
    return code.function
