"""Attention of some rows of queries that see the same keys: each key and value is read once for all of them.

The rows are the lanes of vectors, so that maxima, sums and both products need nothing across lanes. The softmax runs
online over blocks of keys (arXiv:1805.02867, arXiv:2205.14135); what comes out is not yet divided by its sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llvmlite import ir

from lookonce.models.kernels.code import FLOAT, INT, POINTER, Code, Value

KEYS = 64  # of a block of the online softmax
NEVER = -1e30  # a score that weighs nothing; finite, so that the difference of two is no NaN
_TILE = 4  # keys, or places of a head, computed together

RowPointer = Callable[[Value], Value]
"""From a row's number to where it begins, a pointer to its `size` float32."""
RowNumber = Callable[[Value], Value]
"""From a row's number to an integer."""


class Queries:
    """`vectors` vectors of rows, in a function while it is written: load, attend, store."""

    def __init__(self, code: Code, size: int, vectors: int) -> None:
        """`size` is a head's, a multiple of the vectors' lanes."""
        self._code, self._size, self._columns = code, size, range(vectors)
        self._rows = vectors * code.lanes
        self._queries = code.variable(FLOAT, count=size * self._rows)  # [d, rows], scaled
        self._scores = code.variable(FLOAT, count=KEYS * self._rows)  # [keys, rows]
        self._out = code.variable(FLOAT, count=size * self._rows)  # [d, rows]
        self.maxima = [code.variable(code.vector) for _ in self._columns]
        self.sums = [code.variable(code.vector) for _ in self._columns]

    def load(self, row: RowPointer, scale: float = 1.0) -> None:
        """Read the queries and scale them: a score weighs 2 to its power. Nothing has been seen yet."""
        code = self._code
        zero = code.constant(0.0, code.vector)
        for maximum, total in zip(self.maxima, self.sums, strict=True):
            code.set(maximum, code.constant(NEVER, code.vector))
            code.set(total, zero)
        with code.loop(self._size * self._rows, step=code.lanes) as place:
            code.put(zero, self._out, place)
        load = _load_tile(code)
        with self._tiles(row) as (lines, place, column):
            target = code.at(self._queries, self._at(place, column))
            code.build.call(load, [lines, place, target, code.whole(self._rows), code.constant(scale)])

    def attend(
        self, keys: Value, values: Value, begin: Value | int, stop: Value, last: RowNumber | None = None
    ) -> None:
        """See keys [begin, stop) of `keys` and `values` [T, d]; with `last`, which says the last one that a row may
        see, no later ones."""
        code = self._code
        bounds = None if last is None else self._bounds(last)
        with code.loop(stop, begin, KEYS) as first:
            count, offset = code.least(KEYS, code.minus(stop, first)), code.times(first, self._size)
            before = self._score(code.at(keys, offset), count, first, bounds)
            self._mix(code.at(values, offset), self._weigh(before, count), count)

    def store(self, row: RowPointer, *, divided: bool) -> None:
        """Write what was found, `divided` by the sums or not yet. Rows of all lanes are written."""
        code = self._code
        shares = code.variable(FLOAT, count=self._rows)
        for column, total in enumerate(self.sums):
            one = code.constant(1.0, code.vector)
            share = code.build.fdiv(one, code.get(total, code.vector)) if divided else one
            code.put(share, shares, column * code.lanes)
        store = _store_tile(code)
        with self._tiles(row) as (lines, place, column):
            source = code.at(self._out, self._at(place, column))
            code.build.call(store, [lines, place, source, code.whole(self._rows), code.at(shares, column)])

    @contextmanager
    def _tiles(self, row: RowPointer) -> Iterator[tuple[Value, Value, Value]]:
        """Squares of rows by places: pointers to its rows, the first place, the first row."""
        code = self._code
        lines = code.variable(POINTER, count=code.lanes)
        with code.loop(self._rows, step=code.lanes) as column:
            for number in range(code.lanes):
                code.set(code.place(lines, number, POINTER), row(code.plus(column, number)))
            with code.loop(self._size, step=code.lanes) as place:
                yield lines, place, column

    def _at(self, line: Value, column: Value | int) -> Value:
        """The place of a row in a matrix [n, rows]."""
        return self._code.plus(self._code.times(line, self._rows), column)

    def _bounds(self, last: RowNumber) -> list[Value]:
        """Numbers of keys as vectors of float32, which holds them exactly below 2^24."""
        code = self._code
        numbers = code.variable(FLOAT, count=self._rows)
        with code.loop(self._rows) as row:
            code.put(code.build.sitofp(last(row), FLOAT), numbers, row)
        return [code.row(numbers, column * code.lanes) for column in self._columns]

    def _score(self, keys: Value, count: Value, first: Value, bounds: list[Value] | None) -> list[Value]:
        """Scores [count, rows] of the keys from `keys` on, of which the first has the number `first`; maxima rise to
        them. Returns what those were before."""
        code = self._code
        before = [code.get(maximum, code.vector) for maximum in self.maxima]
        whole = code.minus(count, code.rest(count, _TILE))
        for height, start, stop in ((_TILE, 0, whole), (1, whole, count)):
            with code.loop(stop, start, height) as key:
                lines = [code.at(keys, code.times(code.plus(key, line), self._size)) for line in range(height)]
                zeros = [[code.constant(0.0, code.vector)] * len(self._columns) for _ in lines]
                for line, scored in enumerate(self._product(lines, 1, self._queries, zeros, self._size)):
                    for column, score in enumerate(scored):
                        if bounds is not None:
                            number = code.build.sitofp(code.plus(first, key, line), FLOAT)
                            seen = code.build.fcmp_ordered("<=", code.spread(number), bounds[column])
                            score = code.build.select(seen, score, code.constant(NEVER, code.vector))
                        code.put(score, self._scores, self._at(code.plus(key, line), column * code.lanes))
                        maximum = self.maxima[column]
                        code.set(maximum, code.larger(code.get(maximum, code.vector), score))
        return before

    def _weigh(self, before: list[Value], count: Value) -> list[Value]:
        """Scores become weights, added to the sums; returns what earlier results fade by."""
        code, build = self._code, self._code.build
        highest = [code.get(maximum, code.vector) for maximum in self.maxima]
        faded = [code.power(build.fsub(old, new)) for old, new in zip(before, highest, strict=True)]
        for total, fade in zip(self.sums, faded, strict=True):
            code.set(total, build.fmul(code.get(total, code.vector), fade))
        with code.loop(count) as key:
            for column, total in enumerate(self.sums):
                place = self._at(key, column * code.lanes)
                weight = code.power(build.fsub(code.row(self._scores, place), highest[column]))
                code.put(weight, self._scores, place)
                code.set(total, build.fadd(code.get(total, code.vector), weight))
        return faded

    def _mix(self, values: Value, faded: list[Value], count: Value) -> None:
        """out = faded out + values^T weights."""
        code = self._code
        with code.loop(self._size, step=_TILE) as place:
            tile = range(_TILE)
            begun = [
                [
                    code.build.fmul(code.row(self._out, self._at(code.plus(place, line), column * code.lanes)), fade)
                    for column, fade in enumerate(faded)
                ]
                for line in tile
            ]
            lines = [code.at(values, code.plus(place, line)) for line in tile]
            for line, mixed in enumerate(self._product(lines, self._size, self._scores, begun, count)):
                for column, value in enumerate(mixed):
                    code.put(value, self._out, self._at(code.plus(place, line), column * code.lanes))

    def _product(
        self, lines: list[Value], step: int, matrix: Value, begun: list[list[Value]], count: Value | int
    ) -> list[list[Value]]:
        """begun[r][c] + sum over k < count of lines[r][k * step] * matrix[k, c], c a vector of rows."""
        code = self._code
        sums = [[code.variable(code.vector, value) for value in row] for row in begun]
        with code.loop(count) as k:
            right = [code.row(matrix, self._at(k, column * code.lanes)) for column in self._columns]
            for line, row in zip(lines, sums, strict=True):
                left = code.spread(code.number(line, code.times(k, step)))
                for total, vector in zip(row, right, strict=True):
                    code.set(total, code.multiply_add(left, vector, code.get(total, code.vector)))
        return [[code.get(total, code.vector) for total in row] for row in sums]


def _load_tile(code: Code) -> ir.Function:
    """A function that moves a square of places of `lanes` rows, scaled, to a matrix [places, width]. Written once for
    all numbers of vectors: to compile its shuffles takes as long as to compile the products."""

    def write(own: Code) -> None:
        lines, place, matrix, width, scale = own.function.args
        read = [own.row(_line(own, lines, number), place) for number in range(own.lanes)]
        for number, vector in enumerate(own.transposed(read)):
            own.put(own.build.fmul(vector, own.spread(scale)), matrix, own.times(number, width))

    return _tile(code, "load_tile", FLOAT, write)


def _store_tile(code: Code) -> ir.Function:
    """A function that moves such a square from a matrix to rows; each row times its own of `shares`."""

    def write(own: Code) -> None:
        lines, place, matrix, width, shares = own.function.args
        share = own.row(shares)
        found = [own.build.fmul(own.row(matrix, own.times(number, width)), share) for number in range(own.lanes)]
        for number, vector in enumerate(own.transposed(found)):
            own.put(vector, _line(own, lines, number), place)

    return _tile(code, "store_tile", POINTER, write)


def _line(code: Code, lines: Value, number: int) -> Value:
    return code.get(code.place(lines, number, POINTER), POINTER)


def _tile(code: Code, name: str, last: ir.Type, write: Callable[[Code], None]) -> ir.Function:
    known = code.module.globals.get(name)
    if known is not None:
        return known
    own = Code(code.module, name, (POINTER, INT, POINTER, INT, last), code.lanes)
    own.function.linkage = "internal"
    write(own)
    own.end()
    return own.function
