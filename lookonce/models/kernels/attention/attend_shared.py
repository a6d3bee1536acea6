"""`attend_shared`: rows of queries against a span of a shared prefix, each key and value read once for up to `block`
rows."""

from __future__ import annotations

from llvmlite import ir

from lookonce.models.kernels.attention.step_structs import CHUNK, Heads, KVSpan, SharedItem, SuffixAttention
from lookonce.models.kernels.code import Code, Value
from lookonce.models.kernels.queries import Queries


class AttendShared:
    """Writes the kernel: a function `attend_shared` of a pointer to a `SuffixAttention`."""

    def __init__(self, module: ir.Module, heads: Heads) -> None:
        self._module, self._shape = module, heads
        self.size, self.group, self.heads, self.lanes = heads.size, heads.group, heads.kv_heads, heads.lanes

    def write(self) -> ir.Function:
        """Take work items: first those of spans, then the storing of new keys and values."""
        blocks = [self._attend_span(vectors) for vectors in range(1, self._shape.vectors + 1)]
        code = Code(self._module, "attend_shared", 1, self.lanes)
        code.function.linkage = "internal"
        step, build = code.function.args[0], code.build
        items = code.field(step, SuffixAttention.item_count)
        stores = code.over(code.plus(code.field(step, SuffixAttention.stored), CHUNK - 1), CHUNK)
        with (
            code.work(step, SuffixAttention.shared_counter, code.plus(items, stores)) as number,
            build.if_else(build.icmp_signed("<", number, items)) as (attend, store),
        ):
            with attend:
                item = code.element(code.field(step, SuffixAttention.items), SharedItem, number)
                partial = code.at(code.field(step, SuffixAttention.partial), code.field(item, SharedItem.place))
                vectors = code.over(code.plus(code.field(item, SharedItem.rows), self.lanes - 1), self.lanes)
                for count, function in enumerate(blocks, 1):
                    with build.if_then(build.icmp_signed("==", vectors, code.whole(count))):
                        build.call(function, [step, item, partial])
            with store:
                self._store(code, step, code.minus(number, items))
        code.end()
        return code.function

    def _store(self, code: Code, step: Value, chunk: Value) -> None:
        first, told = code.times(chunk, CHUNK), SuffixAttention
        last = code.least(code.plus(first, CHUNK), code.field(step, told.stored))
        rows = code.field(step, told.pool_rows)
        for new, new_step, pool in (
            (told.key, told.key_step, told.pool_keys),
            (told.value, told.value_step, told.pool_values),
        ):
            source, destination = code.field(step, new), code.field(step, pool)
            distance = code.field(step, new_step)
            with code.loop(last, first) as token, code.loop(self.heads) as head:
                row = code.integer(rows, code.plus(code.times(token, self.heads), head))
                begin = code.plus(code.times(token, distance), code.times(head, self.size))
                for place in range(0, self.size, self.lanes):
                    moved = code.row(source, code.plus(begin, place))
                    code.put(moved, destination, code.plus(code.times(row, self.size), place))

    def _attend_span(self, vectors: int) -> ir.Function:
        """One work item of up to `vectors` vectors of rows: (step, item, partial)."""
        code = Code(self._module, f"attend_shared_{vectors}", 3, self.lanes)
        code.function.linkage = "internal"
        step, item, partial = code.function.args
        head = code.field(item, SharedItem.head)
        span = code.element(code.field(step, SuffixAttention.spans), KVSpan, code.field(item, SharedItem.span))
        begin = code.times(head, code.field(span, KVSpan.head_step))
        keys, values = (code.at(code.field(span, field), begin) for field in (KVSpan.keys, KVSpan.values))

        queries = Queries(code, self.size, vectors)
        queries.load(lambda row: self._query(code, step, item, head, row), self._shape.scale)
        queries.attend(keys, values, code.field(item, SharedItem.begin), code.field(item, SharedItem.end))
        queries.store(lambda row: code.at(partial, code.times(row, self.size)), divided=False)
        height = code.field(item, SharedItem.height)
        for column, (maximum, total) in enumerate(zip(queries.maxima, queries.sums, strict=True)):
            at = code.plus(code.times(height, self.size), column * self.lanes)
            code.put(code.get(maximum, code.vector), partial, at)
            code.put(code.get(total, code.vector), partial, code.plus(at, height))
        code.end()
        return code.function

    def _query(self, code: Code, step: Value, item: Value, head: Value, row: Value) -> Value:
        """Where a row of an item begins; places behind the last row repeat it."""
        last = code.minus(code.field(item, SharedItem.rows), 1)
        number = code.plus(code.field(item, SharedItem.row), code.least(row, last))
        token, member = code.over(number, self.group), code.rest(number, self.group)
        begin = code.times(token, code.field(step, SuffixAttention.query_step))
        of_head = code.times(code.plus(code.times(head, self.group), member), self.size)
        return code.at(code.field(step, SuffixAttention.query), code.plus(begin, of_head))
