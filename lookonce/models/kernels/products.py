"""Products x W^T of float32 rows with a model's weights, written for the CPU at hand.

W is laid out once in panels: some columns of the result at a time, for each place of a row their weights side by side.
A tile of rows times a panel stays in registers (K. Goto, R. van de Geijn, "Anatomy of high-performance matrix
multiplication", 2008); every so many places it is added to what came before, so that roundings don't pile up. A row's
numbers depend neither on the rows beside it nor on the number of threads, and nothing is compiled or kept for another
number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from llvmlite import ir

from lookonce.models.kernels.code import FLOAT, INT, POINTER, Code, Value
from lookonce.models.kernels.compiling import LANES, VECTORS
from lookonce.models.kernels.structs import FLOAT32, Struct, integer, pointer

HEIGHT = 6  # rows of a tile
WIDTH = LANES * VECTORS  # columns of a panel
_BLOCK = 16 * HEIGHT  # rows that a thread takes at once
_DEPTH = 256  # places of a row that are summed by themselves


class Product(Struct):
    """A product of rows with a matrix in panels."""

    counter = integer()  # starts at zero
    rows = integer()
    depth = integer()  # places of a row of `source`
    columns = integer()  # of `out`, a multiple of LANES
    panels = integer()
    source = pointer(FLOAT32, "rows", "depth")
    weight = pointer(FLOAT32, "panels", "depth", WIDTH)
    bias = pointer(FLOAT32, "columns")  # not for `product_gated`
    other = pointer(FLOAT32, "rows", "columns")  # for `product_plus`; may be `out`
    out = pointer(FLOAT32, "rows", "columns")


Epilogue = Callable[[Code, list[Value], Value, Value], Value]
"""(code, sums that make a vector of `out`, its first column, its place in `out`) -> the vector"""


def write_products(module: ir.Module) -> None:
    """Functions of a pointer to a `Product`: `product`, x W^T + bias; `product_plus`, the same and `other`;
    `product_gelu`, the same through QuickGELU, y * sigmoid(1.702 y); `product_gated`, SiLU(x G^T) * (x U^T), where a
    panel's first half belongs to G and its second half to U."""
    tiles = [_write_tile(module, height) for height in range(1, HEIGHT + 1)]
    _write(module, "product", tiles, _with_bias, VECTORS)
    _write(module, "product_plus", tiles, _with_rows, VECTORS)
    _write(module, "product_gelu", tiles, _quick_gelu, VECTORS)
    _write(module, "product_gated", tiles, _gated, VECTORS // 2)


def _write(module: ir.Module, name: str, tiles: list[ir.Function], epilogue: Epilogue, vectors: int) -> None:
    """`vectors` of `out` come from a panel."""
    code = Code(module, name, 1, LANES)
    struct, build = code.function.args[0], code.build
    rows, depth, columns, panels = (
        code.field(struct, field) for field in (Product.rows, Product.depth, Product.columns, Product.panels)
    )
    source, weight, out = (code.field(struct, field) for field in (Product.source, Product.weight, Product.out))
    sums = code.variable(FLOAT, count=HEIGHT * WIDTH)
    blocks = code.over(code.plus(rows, _BLOCK - 1), _BLOCK)
    with code.work(struct, Product.counter, code.times(blocks, panels)) as number:
        panel, begin = code.rest(number, panels), code.times(code.over(number, panels), _BLOCK)
        first = code.times(panel, vectors * LANES)
        with code.loop(code.least(code.plus(begin, _BLOCK), rows), begin, HEIGHT) as row:
            height = code.least(HEIGHT, code.minus(rows, row))
            lines, right = (
                code.at(source, code.times(row, depth)),
                code.at(weight, code.times(panel, depth, WIDTH)),
            )
            for count, tile in enumerate(tiles, 1):
                with build.if_then(build.icmp_signed("==", height, code.whole(count))):
                    build.call(tile, [lines, right, depth, sums])
            with code.loop(height) as line:
                at, target = code.times(line, WIDTH), code.times(code.plus(row, line), columns)
                for vector in range(vectors):
                    column = code.plus(first, vector * LANES)
                    with build.if_then(build.icmp_signed("<", column, columns)):
                        places = range(vector * LANES, WIDTH, vectors * LANES)
                        taken = [code.row(sums, code.plus(at, place)) for place in places]
                        place = code.plus(target, column)
                        code.put(epilogue(code, taken, column, place), out, place)
    code.end()


def _write_tile(module: ir.Module, height: int) -> ir.Function:
    """(rows [height, depth], panel [depth, WIDTH], depth, sums): the sums [height, WIDTH] become their product."""
    code = Code(module, f"tile_{height}", (POINTER, POINTER, INT, POINTER), LANES)
    code.function.linkage = "internal"
    rows, panel, depth, found = code.function.args
    lines = [code.at(rows, code.times(line, depth)) for line in range(height)]
    zero = code.constant(0.0, code.vector)
    for place in range(0, height * WIDTH, LANES):
        code.put(zero, found, place)
    sums = [[code.variable(code.vector) for _ in range(VECTORS)] for _ in lines]
    with code.loop(depth, step=_DEPTH) as begin:
        for total in chain.from_iterable(sums):
            code.set(total, zero)
        with code.loop(code.least(code.plus(begin, _DEPTH), depth), begin) as place:
            at = code.times(place, WIDTH)
            right = [code.row(panel, code.plus(at, vector * LANES)) for vector in range(VECTORS)]
            for line, totals in zip(lines, sums, strict=True):
                left = code.spread(code.number(line, place))
                for total, vector in zip(totals, right, strict=True):
                    code.set(total, code.multiply_add(left, vector, code.get(total, code.vector)))
        for number, total in enumerate(chain.from_iterable(sums)):
            before = code.row(found, number * LANES)
            code.put(code.build.fadd(before, code.get(total, code.vector)), found, number * LANES)
    code.end()
    return code.function


def _with_bias(code: Code, sums: list[Value], column: Value, place: Value) -> Value:
    return code.build.fadd(sums[0], code.row(code.field(code.function.args[0], Product.bias), column))


def _with_rows(code: Code, sums: list[Value], column: Value, place: Value) -> Value:
    other = code.row(code.field(code.function.args[0], Product.other), place)
    return code.build.fadd(_with_bias(code, sums, column, place), other)


def _quick_gelu(code: Code, sums: list[Value], column: Value, place: Value) -> Value:
    return code.quick_gelu(_with_bias(code, sums, column, place))


def _gated(code: Code, sums: list[Value], column: Value, place: Value) -> Value:
    build, (gate, up) = code.build, sums
    return build.fmul(build.fmul(gate, code.sigmoid(gate)), up)
