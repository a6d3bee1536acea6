"""What happens to each patch by itself, in one pass: values of its pixels, residual and layer norm, QuickGELU."""

from __future__ import annotations

from llvmlite import ir

from lookonce.models.kernels.code import BYTE, INT, Code, Value
from lookonce.models.kernels.compiling import lanes_for
from lookonce.models.kernels.structs import BYTE as BYTES
from lookonce.models.kernels.structs import FLOAT32, Struct, integer, pointer

CHANNELS = 3  # of an image
_CHUNK = 8  # rows that a thread takes at once


class Lookup(Struct):
    """out = table[channel, pixels]."""

    counter = integer()  # starts at zero
    rows = integer()
    places = integer()
    pixels = pointer(BYTES, "rows", CHANNELS, "places")
    table = pointer(FLOAT32, CHANNELS, 256)
    out = pointer(FLOAT32, "rows", CHANNELS, "places")


class LayerNorm(Struct):
    """out = (source - its mean) / sqrt(its variance + epsilon) * weight + shift, row by row."""

    counter = integer()
    rows = integer()
    source = pointer(FLOAT32, "rows", "width")
    added = pointer(FLOAT32, "rows", "width")  # for `add_norm`
    weight = pointer(FLOAT32, "width")
    shift = pointer(FLOAT32, "width")
    out = pointer(FLOAT32, "rows", "width")


class Gelu(Struct):
    """values *= sigmoid(1.702 values)."""

    counter = integer()
    rows = integer()
    values = pointer(FLOAT32, "rows", "inner")


def write_lookup(module: ir.Module) -> None:
    """A function `lookup` of a pointer to a `Lookup`."""
    code = Code(module, "lookup", 1, 4)
    struct, build = code.function.args[0], code.build
    pixels, table, out = (code.field(struct, field) for field in (Lookup.pixels, Lookup.table, Lookup.out))
    places, rows = code.field(struct, Lookup.places), code.field(struct, Lookup.rows)
    with code.shared_rows(struct, Lookup.counter, rows, _CHUNK) as row, code.loop(CHANNELS) as channel:
        begin = code.times(code.plus(code.times(row, CHANNELS), channel), places)
        source, target = code.place(pixels, begin, BYTE), code.at(out, begin)
        values = code.at(table, code.times(channel, 256))
        with code.loop(places) as place:
            pixel = build.zext(build.load(code.place(source, place, BYTE), typ=BYTE), INT)
            code.put(code.number(values, pixel), target, place)
    code.end()


def write_norm(module: ir.Module, name: str, width: int, epsilon: float, *, adding: bool) -> None:
    """A function of a pointer to a `LayerNorm`; if `adding`, of what `source` then is: source += added."""
    code = Code(module, name, 1, lanes_for(width))
    struct, build, told = code.function.args[0], code.build, LayerNorm
    source, added, out, weight, shift = (
        code.field(struct, field) for field in (told.source, told.added, told.out, told.weight, told.shift)
    )
    together = 4 if width % (4 * code.lanes) == 0 else 1  # sums that needn't wait for each other
    sums = [code.variable(code.vector) for _ in range(together)]

    def mean_of(value: Value) -> Value:
        """Sum of the sums / width, in every lane, and they are zero again."""
        for total in sums:
            value = build.fadd(value, code.get(total, code.vector))
            code.set(total, code.constant(0.0, code.vector))
        return code.spread(build.fmul(code.total(value), code.constant(1 / width)))

    zero = code.constant(0.0, code.vector)
    with code.shared_rows(struct, told.counter, code.field(struct, told.rows), _CHUNK) as row:
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
    """A function `gelu` of a pointer to a `Gelu`."""
    code = Code(module, "gelu", 1, lanes_for(width))
    struct = code.function.args[0]
    values = code.field(struct, Gelu.values)
    with code.shared_rows(struct, Gelu.counter, code.field(struct, Gelu.rows), _CHUNK) as row:
        line = code.at(values, code.times(row, width))
        with code.loop(width, step=code.lanes) as place:
            code.put(code.quick_gelu(code.row(line, place)), line, place)
    code.end()
