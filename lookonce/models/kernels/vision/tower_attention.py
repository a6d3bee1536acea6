"""Attention of a packed batch, each image's patches among themselves, written for one size of heads.

Two kernels, one after the other: `pack_heads` rotates queries and keys and puts each head's one behind the other,
`attend_packed` attends. They take work from counters in a struct until there is none, so that any number of threads may
run them at once. An image's numbers depend neither on its company nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from lookonce.models.kernels.code import INT, LOG2_E, POINTER, Code, Value
from lookonce.models.kernels.compiling import lanes_for
from lookonce.models.kernels.queries import Queries
from lookonce.models.kernels.structs import FLOAT32, Struct, integer, pointer

_CHUNK = 8  # patches that a thread packs at once


class Block(Struct):
    """Patches [row, row + rows) attend to the patches [begin, end) of their image."""

    begin = integer()
    end = integer()
    row = integer()
    rows = integer()


class Attention(Struct):
    """Blocks of a batch's patches; `heads` heads of `size` places."""

    pack_counter = integer()  # both counters start at zero
    attend_counter = integer()
    patches = integer()
    qkv = pointer(FLOAT32, "patches", 3, "heads", "size")
    cos = pointer(FLOAT32, "patches", "half")
    sin = pointer(FLOAT32, "patches", "half")
    packed = pointer(FLOAT32, 3, "heads", "plane")  # queries, scaled and rotated, keys, rotated, and values
    plane = integer()  # of `packed`: patches * size
    out = pointer(FLOAT32, "patches", "heads", "size")
    blocks = pointer(Block, "count")
    count = integer()
    barrier = integer()  # address of a function that returns when all threads have called it; 0 for a lone thread


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
    """Functions of a pointer to an `Attention`: `attend` is both kernels, `attend_more` the second one, for further
    blocks of what is packed already."""
    pack, attend = _write_packing(module, heads), _write_attending(module, heads)
    for name, functions in (("attend", (pack, attend)), ("attend_more", (attend,))):
        code = Code(module, name, 1, heads.lanes)
        code.call_in_turn(functions, code.function.args[0], Attention.barrier)
        code.end()


def _write_packing(module: ir.Module, heads: Heads) -> ir.Function:
    half = heads.size // 2
    code = Code(module, "pack_heads", 1, lanes_for(half))
    code.function.linkage = "internal"
    struct, build = code.function.args[0], code.build
    packed, plane = code.field(struct, Attention.packed), code.field(struct, Attention.plane)
    qkv, cosines, sines = (code.field(struct, field) for field in (Attention.qkv, Attention.cos, Attention.sin))
    scale = code.constant(heads.size**-0.5 * LOG2_E, code.vector)
    with code.shared_rows(struct, Attention.pack_counter, code.field(struct, Attention.patches), _CHUNK) as patch:
        angle, begin = code.times(patch, half), code.times(patch, 3 * heads.count * heads.size)
        for kind, factor in enumerate((scale, None)):  # queries, keys
            for place in range(0, half, code.lanes):
                cos, sin = (code.row(table, code.plus(angle, place)) for table in (cosines, sines))
                if factor is not None:
                    cos, sin = build.fmul(cos, factor), build.fmul(sin, factor)
                with code.loop(heads.count) as head:
                    number = code.plus(head, kind * heads.count)
                    source = code.plus(begin, code.times(number, heads.size), place)
                    target = code.plus(code.times(number, plane), code.times(patch, heads.size), place)
                    first, second = code.row(qkv, source), code.row(qkv, code.plus(source, half))
                    turned = build.fneg(build.fmul(second, sin))
                    code.put(code.multiply_add(first, cos, turned), packed, target)
                    code.put(code.multiply_add(second, cos, build.fmul(first, sin)), packed, code.plus(target, half))
        with code.loop(3 * heads.count, 2 * heads.count) as number:
            source = code.plus(begin, code.times(number, heads.size))
            target = code.plus(code.times(number, plane), code.times(patch, heads.size))
            for place in range(0, heads.size, code.lanes):
                code.put(code.row(qkv, code.plus(source, place)), packed, code.plus(target, place))
    code.end()
    return code.function


def _write_attending(module: ir.Module, heads: Heads) -> ir.Function:
    """Work items are blocks of one head, then of the next: keys and values stay near while they are needed."""
    widths = [_write_block(module, heads, vectors) for vectors in range(1, heads.vectors + 1)]
    code = Code(module, "attend_packed", 1, heads.lanes)
    code.function.linkage = "internal"
    struct, build = code.function.args[0], code.build
    count = code.field(struct, Attention.count)
    with code.work(struct, Attention.attend_counter, code.times(count, heads.count)) as number:
        head = code.over(number, count)
        block = code.element(code.field(struct, Attention.blocks), Block, code.rest(number, count))
        vectors = code.over(code.plus(code.field(block, Block.rows), heads.lanes - 1), heads.lanes)
        for width, function in enumerate(widths, 1):
            with build.if_then(build.icmp_signed("==", vectors, code.whole(width))):
                build.call(function, [struct, block, head])
    code.end()
    return code.function


def _write_block(module: ir.Module, heads: Heads, vectors: int) -> ir.Function:
    """One block of up to `vectors` vectors of rows: (struct, block, number of the head)."""
    code = Code(module, f"attend_packed_{vectors}", (POINTER, POINTER, INT), heads.lanes)
    code.function.linkage = "internal"
    struct, block, head = code.function.args
    packed, plane = code.field(struct, Attention.packed), code.field(struct, Attention.plane)
    query, key, value = (
        code.at(packed, code.times(code.plus(head, kind * heads.count), plane)) for kind in range(3)
    )  # each [patches, d]
    first, count = code.field(block, Block.row), code.field(block, Block.rows)
    out = code.at(code.field(struct, Attention.out), code.times(head, heads.size))

    def query_row(row: Value) -> Value:
        """Rows behind the last repeat it."""
        at = code.plus(first, code.least(row, code.minus(count, 1)))
        return code.at(query, code.times(at, heads.size))

    def out_row(row: Value) -> Value:
        """Rows behind the last are the same numbers once more."""
        at = code.plus(first, code.least(row, code.minus(count, 1)))
        return code.at(out, code.times(at, heads.count * heads.size))

    queries = Queries(code, heads.size, vectors)
    queries.load(query_row)
    queries.attend(key, value, code.field(block, Block.begin), code.field(block, Block.end))
    queries.store(out_row, divided=True)
    code.end()
    return code.function
