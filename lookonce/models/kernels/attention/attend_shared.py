"""`look`: rows of queries against a stretch of a shared prefix, each key and value read once for up to `block` rows."""

from __future__ import annotations

from llvmlite import ir

from lookonce.models.kernels.attention.heads import PIECE, Heads
from lookonce.models.kernels.attention.table import Field, Item
from lookonce.models.kernels.code import Code, Value
from lookonce.models.kernels.queries import Queries


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
        head = code.integer(item, Item.HEAD)
        node = code.times(code.integer(item, Item.PART), 3)
        nodes = code.address(fields, Field.NODES)
        begin = code.times(head, code.integer(nodes, code.plus(node, 2)))
        keys = code.at(code.address(nodes, node), begin)
        values = code.at(code.address(nodes, code.plus(node, 1)), begin)

        queries = Queries(code, self.size, vectors)
        queries.lay(lambda row: self._query(code, fields, item, head, row), self._shape.scale)
        queries.look(keys, values, code.integer(item, Item.BEGIN), code.integer(item, Item.END))
        queries.take(lambda row: code.at(partial, code.times(row, self.size)), divided=False)
        height = code.integer(item, Item.HEIGHT)
        for column, (maximum, total) in enumerate(zip(queries.maxima, queries.sums, strict=True)):
            at = code.plus(code.times(height, self.size), column * self.lanes)
            code.put(code.get(maximum, code.vector), partial, at)
            code.put(code.get(total, code.vector), partial, code.plus(at, height))
        code.end()
        return code.function

    def _query(self, code: Code, fields: Value, item: Value, head: Value, row: Value) -> Value:
        """Where a row of a piece begins; places behind the last row repeat it."""
        last = code.minus(code.integer(item, Item.ROWS), 1)
        number = code.plus(code.integer(item, Item.ROW), code.least(row, last))
        token, member = code.over(number, self.group), code.rest(number, self.group)
        begin = code.times(token, code.integer(fields, Field.QUERY_STEP))
        of_head = code.times(code.plus(code.times(head, self.group), member), self.size)
        return code.at(code.address(fields, Field.QUERY), code.plus(begin, of_head))
