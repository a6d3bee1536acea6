"""`prefill`: new tokens of prefixes attend to all before them and, causally, to their own span.

First new keys and values are stored, then blocks of rows attend to the spans before, to what lies before them in their
own, and last to the keys beside their own. Blocks begin at multiples of their height in the span, however many of its
tokens a step takes.
"""

from __future__ import annotations

from llvmlite import ir

from lookonce.models.kernels.attention.step_structs import (
    CHUNK,
    Heads,
    KVSpan,
    PrefillAttention,
    PrefillItem,
    PrefillPlace,
)
from lookonce.models.kernels.code import Code, Value
from lookonce.models.kernels.queries import Queries


class PrefixPrefill:
    """Writes the kernel: a function `prefill` of a pointer to a `PrefillAttention`."""

    def __init__(self, module: ir.Module, heads: Heads) -> None:
        self._module, self._shape = module, heads
        self.size, self.group, self.heads = heads.size, heads.group, heads.kv_heads

    def write(self) -> ir.Function:
        """Store, then attend."""
        store, attend = self._store(), self._attend()
        code = Code(self._module, "prefill", 1, self._shape.lanes)
        code.call_in_turn((store, attend), code.function.args[0], PrefillAttention.barrier)
        code.end()
        return code.function

    def _store(self) -> ir.Function:
        code = Code(self._module, "prefill_store", 1, self._shape.lanes)
        code.function.linkage = "internal"
        step, told = code.function.args[0], PrefillAttention
        tokens = code.field(step, told.tokens)
        with code.shared_rows(step, told.store_counter, tokens, CHUNK) as token:
            at = code.element(code.field(step, told.places), PrefillPlace, token)
            span, place = self._span(code, step, code.field(at, PrefillPlace.span)), code.field(at, PrefillPlace.place)
            distance = code.field(span, KVSpan.head_step)
            for new, new_step, kept in (
                (told.key, told.key_step, KVSpan.keys),
                (told.value, told.value_step, KVSpan.values),
            ):
                source = code.at(code.field(step, new), code.times(token, code.field(step, new_step)))
                destination = code.at(code.field(span, kept), code.times(place, self.size))
                with code.loop(self.heads) as head:
                    for offset in range(0, self.size, code.lanes):
                        moved = code.row(source, code.plus(code.times(head, self.size), offset))
                        code.put(moved, destination, code.plus(code.times(head, distance), offset))
        code.end()
        return code.function

    def _attend(self) -> ir.Function:
        code = Code(self._module, "prefill_attend", 1, self._shape.lanes)
        code.function.linkage = "internal"
        step = code.function.args[0]
        with code.work(step, PrefillAttention.attend_counter, code.field(step, PrefillAttention.item_count)) as number:
            self._block(code, step, code.element(code.field(step, PrefillAttention.items), PrefillItem, number))
        code.end()
        return code.function

    def _block(self, code: Code, step: Value, item: Value) -> None:
        group, size = self.group, self.size
        head, first, place = (
            code.field(item, field) for field in (PrefillItem.head, PrefillItem.token, PrefillItem.place)
        )
        last, own = code.minus(code.field(item, PrefillItem.count), 1), code.field(item, PrefillItem.own)
        border = code.minus(place, code.rest(place, self._shape.block_tokens))

        def token(row: Value) -> Value:
            """Rows behind the last token's repeat those of the last."""
            return code.least(code.over(row, group), last)

        def begin(row: Value) -> Value:
            """Where a row's head begins among those of its token."""
            return code.times(code.plus(code.times(head, group), code.rest(row, group)), size)

        def query(row: Value) -> Value:
            at = code.times(code.plus(first, token(row)), code.field(step, PrefillAttention.query_step))
            return code.at(code.field(step, PrefillAttention.query), code.plus(at, begin(row)))

        def out(row: Value) -> Value:
            at = code.times(code.plus(first, token(row)), self.heads * group * size)
            return code.at(code.field(step, PrefillAttention.out), code.plus(at, begin(row)))

        queries = Queries(code, size, self._shape.vectors)
        queries.load(query, self._shape.scale)
        with code.loop(code.plus(own, 1), code.field(item, PrefillItem.first)) as number:
            span = self._span(code, step, number)
            whole = code.build.icmp_signed("<", number, own)
            stop = code.build.select(whole, code.field(span, KVSpan.tokens), border)
            queries.attend(*self._keys(code, span, head), 0, stop)
        stop, keys = code.plus(place, last, 1), self._keys(code, self._span(code, step, own), head)
        queries.attend(*keys, border, stop, lambda row: code.plus(place, token(row)))
        queries.store(out, divided=True)

    def _span(self, code: Code, step: Value, number: Value) -> Value:
        return code.element(code.field(step, PrefillAttention.spans), KVSpan, number)

    def _keys(self, code: Code, span: Value, head: Value) -> tuple[Value, Value]:
        """Keys and values [tokens, size] of a head."""
        offset = code.times(head, code.field(span, KVSpan.head_step))
        return code.at(code.field(span, KVSpan.keys), offset), code.at(code.field(span, KVSpan.values), offset)
