"""What happens to each patch by itself, in one pass: values of its pixels, residual and layer norm, QuickGELU."""

from __future__ import annotations

from enum import IntEnum

from llvmlite import ir

from lookonce.models.kernels.code import BYTE, INT, Code, Value
from lookonce.models.kernels.compiling import lanes_for

CHANNELS = 3  # of an image
_PIECE = 8  # rows that a thread takes at once


class Field(IntEnum):
    """What the table holds at each place: pointers to float32, but for the first two."""

    COUNTER = 0  # starts at zero
    ROWS = 1
    ROW = 2
    ADDED = 3
    OUT = 4
    WEIGHT = 5
    SHIFT = 6


class Lookup(IntEnum):
    """The same for `lookup`."""

    COUNTER = 0
    ROWS = 1
    PIXELS = 2  # pointer to uint8 [ROWS, 3, PLACES]
    TABLE = 3  # float32 [3, 256]
    OUT = 4  # float32 [ROWS, 3, PLACES]
    PLACES = 5


def write_lookup(module: ir.Module) -> None:
    """A function `lookup` of a pointer to its table: OUT = TABLE[channel, PIXELS]."""
    code = Code(module, "lookup", 1, 4)
    fields, build = code.function.args[0], code.build
    pixels, table, out = (code.address(fields, field) for field in (Lookup.PIXELS, Lookup.TABLE, Lookup.OUT))
    places = code.integer(fields, Lookup.PLACES)
    rows = code.integer(fields, Lookup.ROWS)
    with code.shared_rows(fields, Lookup.COUNTER, rows, _PIECE) as row, code.loop(CHANNELS) as channel:
        begin = code.times(code.plus(code.times(row, CHANNELS), channel), places)
        source, target = code.place(pixels, begin, BYTE), code.at(out, begin)
        values = code.at(table, code.times(channel, 256))
        with code.loop(places) as place:
            pixel = build.zext(build.load(code.place(source, place, BYTE), typ=BYTE), INT)
            code.put(code.number(values, pixel), target, place)
    code.end()


def write_norm(module: ir.Module, name: str, width: int, epsilon: float, *, adding: bool) -> None:
    """A function of a pointer to the table: OUT = (ROW - its mean) / sqrt(its variance + epsilon) * WEIGHT + SHIFT; if
    `adding`, of what ROW then is: ROW += ADDED."""
    code = Code(module, name, 1, lanes_for(width))
    fields, build = code.function.args[0], code.build
    source, added, out, weight, shift = (code.address(fields, field) for field in list(Field)[Field.ROW :])
    together = 4 if width % (4 * code.lanes) == 0 else 1  # sums that needn't wait for each other
    sums = [code.variable(code.vector) for _ in range(together)]

    def mean_of(value: Value) -> Value:
        """Sum of the sums / width, in every lane, and they are zero again."""
        for total in sums:
            value = build.fadd(value, code.get(total, code.vector))
            code.set(total, code.constant(0.0, code.vector))
        return code.spread(build.fmul(code.total(value), code.constant(1 / width)))

    zero = code.constant(0.0, code.vector)
    with code.shared_rows(fields, Field.COUNTER, code.integer(fields, Field.ROWS), _PIECE) as row:
        begin = code.times(row, width)
        line, change, target = (code.at(base, begin) for base in (source, added, out))
        for total in sums:
            code.set(total, zero)
        with code.loop(width, step=together * code.lanes) as place:
            for number, total in enumerate(sums):
                at = code.plus(place, number * code.lanes)
                value = code.row(line, at)
                if adding:
                    value = build.fadd(value, code.row(change, at))
                    code.put(value, line, at)
                code.set(total, build.fadd(code.get(total, code.vector), value))
        mean = mean_of(zero)
        with code.loop(width, step=together * code.lanes) as place:
            for number, total in enumerate(sums):
                value = build.fsub(code.row(line, code.plus(place, number * code.lanes)), mean)
                code.set(total, code.multiply_add(value, value, code.get(total, code.vector)))
        variance = build.fadd(mean_of(zero), code.constant(epsilon, code.vector))
        scale = build.fdiv(code.constant(1.0, code.vector), code.root(variance))
        with code.loop(width, step=code.lanes) as place:
            value = build.fmul(build.fsub(code.row(line, place), mean), scale)
            code.put(code.multiply_add(value, code.row(weight, place), code.row(shift, place)), target, place)
    code.end()


def write_gelu(module: ir.Module, width: int) -> None:
    """A function `gelu` of a pointer to the table: ROW *= sigmoid(1.702 ROW)."""
    code = Code(module, "gelu", 1, lanes_for(width))
    fields = code.function.args[0]
    source = code.address(fields, Field.ROW)
    with code.shared_rows(fields, Field.COUNTER, code.integer(fields, Field.ROWS), _PIECE) as row:
        line = code.at(source, code.times(row, width))
        with code.loop(width, step=code.lanes) as place:
            code.put(code.quick_gelu(code.row(line, place)), line, place)
    code.end()
