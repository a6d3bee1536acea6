"""`look`: rows of queries against a stretch of a shared prefix, each key and value read once for up to `block` rows.

The rows are the lanes of vectors, so that maxima, sums and both products need nothing across lanes. The softmax runs
online over blocks of keys (arXiv:1805.02867, arXiv:2205.14135); what comes out is not yet divided by its sum.
"""

from __future__ import annotations

from llvmlite import ir

from lm_service.engine.packed.native.heads import KEYS, NEVER, PIECE, Heads
from lm_service.engine.packed.native.table import Field, Item
from lookonce.native.code import FLOAT, Code, Value

_TILE = 4  # keys, or places of a head, computed together


class Look:
    """Writes the kernel: a function `look` of a pointer to the table."""

    def __init__(self, module: ir.Module, heads: Heads) -> None:
        self._module, self._shape = module, heads
        self.size, self.group, self.heads, self.lanes = heads.size, heads.group, heads.kv_heads, heads.lanes

    def write(self) -> ir.Function:
        """Take pieces of work: first the stretches, then the storing of new keys and values."""
        blocks = [self._look_at(vectors) for vectors in range(1, self._shape.vectors + 1)]
        code = Code(self._module, "look", 1, self.lanes)
        code.function.linkage = "internal"
        fields, build = code.function.args[0], code.build
        looks = code.integer(fields, Field.LOOKS)
        stores = code.over(code.plus(code.integer(fields, Field.STORED), PIECE - 1), PIECE)
        with (
            code.work(code.place(fields, Field.LOOK_COUNTER), code.plus(looks, stores)) as number,
            build.if_else(build.icmp_signed("<", number, looks)) as (look, store),
        ):
            with look:
                item = code.place(code.address(fields, Field.ITEMS), code.times(number, len(Item)))
                partial = code.at(code.address(fields, Field.PARTIAL), code.integer(item, Item.PLACE))
                vectors = code.over(code.plus(code.integer(item, Item.ROWS), self.lanes - 1), self.lanes)
                for count, function in enumerate(blocks, 1):
                    with build.if_then(build.icmp_signed("==", vectors, code.whole(count))):
                        build.call(function, [fields, item, partial])
            with store:
                self._store(code, fields, code.minus(number, looks))
        code.end()
        return code.function

    def _store(self, code: Code, fields: Value, piece: Value) -> None:
        first = code.times(piece, PIECE)
        last = code.least(code.plus(first, PIECE), code.integer(fields, Field.STORED))
        rows = code.address(fields, Field.POOL_ROWS)
        for source, step, pool in (
            (Field.KEY, Field.KEY_STEP, Field.POOL_KEYS),
            (Field.VALUE, Field.VALUE_STEP, Field.POOL_VALUES),
        ):
            come, go = code.address(fields, source), code.address(fields, pool)
            distance = code.integer(fields, step)
            with code.loop(last, first) as token, code.loop(self.heads) as head:
                row = code.integer(rows, code.plus(code.times(token, self.heads), head))
                begin = code.plus(code.times(token, distance), code.times(head, self.size))
                for place in range(0, self.size, self.lanes):
                    moved = code.row(come, code.plus(begin, place))
                    code.put(moved, go, code.plus(code.times(row, self.size), place))

    def _look_at(self, vectors: int) -> ir.Function:
        """One piece of work of up to `vectors` vectors of rows: (fields, item, partial)."""
        code = Code(self._module, f"look_{vectors}", 3, self.lanes)
        code.function.linkage = "internal"
        fields, item, partial = code.function.args
        rows, lanes = vectors * self.lanes, self.lanes
        queries = code.variable(FLOAT, count=self.size * rows)
        scores = code.variable(FLOAT, count=KEYS * rows)
        out = code.variable(FLOAT, count=self.size * rows)
        head = code.integer(item, Item.HEAD)
        self._lay_queries(code, fields, item, head, queries, rows)

        node = code.times(code.integer(item, Item.PART), 3)
        nodes = code.address(fields, Field.NODES)
        begin = code.times(head, code.integer(nodes, code.plus(node, 2)))
        keys = code.at(code.address(nodes, node), begin)
        values = code.at(code.address(nodes, code.plus(node, 1)), begin)

        columns = range(vectors)
        maxima = [code.variable(code.vector, code.constant(NEVER, code.vector)) for _ in columns]
        sums = [code.variable(code.vector, code.constant(0.0, code.vector)) for _ in columns]
        with code.loop(self.size * rows, step=lanes) as place:
            code.put(code.constant(0.0, code.vector), out, place)
        stop = code.integer(item, Item.END)
        with code.loop(stop, code.integer(item, Item.BEGIN), KEYS) as first:
            count = code.least(KEYS, code.minus(stop, first))
            before = self._score(code, code.at(keys, code.times(first, self.size)), queries, scores, maxima, count)
            faded = self._weigh(code, scores, before, maxima, sums, count)
            self._mix(code, code.at(values, code.times(first, self.size)), scores, out, faded, count)

        with code.loop(self.size) as place, code.loop(code.integer(item, Item.ROWS)) as row:
            found = code.number(out, code.plus(code.times(place, rows), row))
            code.put(found, partial, code.plus(code.times(row, self.size), place))
        height = code.integer(item, Item.HEIGHT)
        for column in columns:
            at = code.plus(code.times(height, self.size), column * lanes)
            code.put(code.get(maxima[column], code.vector), partial, at)
            code.put(code.get(sums[column], code.vector), partial, code.plus(at, height))
        code.end()
        return code.function

    def _lay_queries(self, code: Code, fields: Value, item: Value, head: Value, queries: Value, rows: int) -> None:
        """Queries [d, rows], scaled; places behind the last row repeat it."""
        source, step = code.address(fields, Field.QUERY), code.integer(fields, Field.QUERY_STEP)
        first, last = code.integer(item, Item.ROW), code.minus(code.integer(item, Item.ROWS), 1)
        with code.loop(rows) as row:
            number = code.plus(first, code.least(row, last))
            token, member = code.over(number, self.group), code.rest(number, self.group)
            begin = code.plus(
                code.times(token, step), code.times(code.plus(code.times(head, self.group), member), self.size)
            )
            with code.loop(self.size) as place:
                scaled = code.build.fmul(code.number(source, code.plus(begin, place)), code.constant(self._shape.scale))
                code.put(scaled, queries, code.plus(code.times(place, rows), row))

    def _score(
        self, code: Code, keys: Value, queries: Value, scores: Value, maxima: list[Value], count: Value
    ) -> list[Value]:
        """Scores [count, rows] of the keys from `keys` on; maxima rise to them. Returns what those were before."""
        rows = len(maxima) * self.lanes
        before = [code.get(maximum, code.vector) for maximum in maxima]
        whole = code.minus(count, code.rest(count, _TILE))
        for height, start, stop in ((_TILE, 0, whole), (1, whole, count)):
            with code.loop(stop, start, height) as key:
                lines = [code.at(keys, code.times(code.plus(key, line), self.size)) for line in range(height)]
                zeros = [[code.constant(0.0, code.vector)] * len(maxima) for _ in lines]
                found = self._product(code, lines, 1, queries, rows, zeros, self.size)
                for line, scored in enumerate(found):
                    for column, score in enumerate(scored):
                        code.put(score, scores, code.plus(code.times(code.plus(key, line), rows), column * self.lanes))
                        maximum = maxima[column]
                        code.set(maximum, code.larger(code.get(maximum, code.vector), score))
        return before

    def _weigh(
        self, code: Code, scores: Value, before: list[Value], maxima: list[Value], sums: list[Value], count: Value
    ) -> list[Value]:
        """Scores become weights, added to the sums; returns what earlier results fade by."""
        build, rows = code.build, len(maxima) * self.lanes
        highest = [code.get(maximum, code.vector) for maximum in maxima]
        faded = [code.exponential(build.fsub(old, new)) for old, new in zip(before, highest, strict=True)]
        for total, fade in zip(sums, faded, strict=True):
            code.set(total, build.fmul(code.get(total, code.vector), fade))
        with code.loop(count) as key:
            for column in range(len(maxima)):
                place = code.plus(code.times(key, rows), column * self.lanes)
                weight = code.exponential(build.fsub(code.row(scores, place), highest[column]))
                code.put(weight, scores, place)
                code.set(sums[column], build.fadd(code.get(sums[column], code.vector), weight))
        return faded

    def _mix(self, code: Code, values: Value, weights: Value, out: Value, faded: list[Value], count: Value) -> None:
        """out [d, rows] = faded out + values^T weights."""
        rows = len(faded) * self.lanes
        with code.loop(self.size, step=_TILE) as place:
            begun = [
                [
                    code.build.fmul(
                        code.row(out, code.plus(code.times(code.plus(place, line), rows), column * self.lanes)), fade
                    )
                    for column, fade in enumerate(faded)
                ]
                for line in range(_TILE)
            ]
            lines = [code.at(values, code.plus(place, line)) for line in range(_TILE)]
            done = self._product(code, lines, self.size, weights, rows, begun, count)
            for line, mixed in enumerate(done):
                for column, value in enumerate(mixed):
                    code.put(value, out, code.plus(code.times(code.plus(place, line), rows), column * self.lanes))

    def _product(
        self,
        code: Code,
        lines: list[Value],
        step: int,
        matrix: Value,
        width: int,
        begun: list[list[Value]],
        count: Value | int,
    ) -> list[list[Value]]:
        """begun[r][c] + sum over k < count of lines[r][k * step] * matrix[k, c], c a vector of columns."""
        sums = [[code.variable(code.vector, value) for value in row] for row in begun]
        with code.loop(count) as k:
            right = [
                code.row(matrix, code.plus(code.times(k, width), column * self.lanes))
                for column in range(len(begun[0]))
            ]
            for line, row in zip(lines, sums, strict=True):
                left = code.spread(code.number(line, code.times(k, step)))
                for total, vector in zip(row, right, strict=True):
                    code.set(total, code.multiply_add(left, vector, code.get(total, code.vector)))
        return [[code.get(total, code.vector) for total in row] for row in sums]
