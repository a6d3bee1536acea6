"""`prefill`: new tokens of stretches of prefixes attend to all before them and, causally, to their own stretch.

First new keys and values are stored, then blocks of rows look at the stretches before, at what lies before them in
their own, and last at the keys beside their own. Blocks begin at multiples of their height in the stretch, however many
of its tokens a step takes.
"""

from __future__ import annotations

from enum import IntEnum

from llvmlite import ir

from lookonce.models.kernels.attention.heads import PIECE, Heads
from lookonce.models.kernels.code import Code, Value
from lookonce.models.kernels.queries import Queries


class Field(IntEnum):
    """What the table holds at each place. Sizes and distances count elements, pointers are addresses."""

    STORE_COUNTER = 0  # both counters start at zero
    LOOK_COUNTER = 1
    TOKENS = 2
    LOOKS = 3
    NODES = 4  # pointer to int64 [stretches, 3]: keys, values, distance of heads, in the layer at hand
    QUERY = 5  # pointer to float32, tokens QUERY_STEP apart, heads one after the other
    QUERY_STEP = 6
    KEY = 7  # the tokens' new keys and values
    KEY_STEP = 8
    VALUE = 9
    VALUE_STEP = 10
    OUT = 11  # float32 [tokens, heads * d]
    ITEMS = 12  # pointer to int64 [LOOKS, len(Item)]
    LENGTHS = 13  # int64 [stretches]: their tokens
    PLACES = 14  # int64 [tokens, 2]: a token's stretch, and its place there
    BARRIER = 15  # pointer to a function that returns when all threads have called it; 0 for a lone thread


class Item(IntEnum):
    """A piece of work: one key-value head of COUNT of the step's tokens, from TOKEN on. They lie in the stretch OWN,
    from PLACE on, behind the stretches [FIRST, OWN)."""

    HEAD = 0
    TOKEN = 1
    COUNT = 2
    PLACE = 3
    FIRST = 4
    OWN = 5


def tokens_of_block(heads: Heads) -> int:
    """Tokens whose rows fill a block; 0: the heads of one token are too many."""
    return heads.block // heads.group


class PrefixPrefill:
    """Writes the kernel: a function `prefill` of a pointer to the table."""

    def __init__(self, module: ir.Module, heads: Heads) -> None:
        self._module, self._shape = module, heads
        self.size, self.group, self.heads = heads.size, heads.group, heads.kv_heads

    def write(self) -> ir.Function:
        """Store, then look."""
        store, look = self._store(), self._look()
        code = Code(self._module, "fill", 1, self._shape.lanes)
        code.call_in_turn((store, look), code.function.args[0], Field.BARRIER)
        code.end()
        return code.function

    def _store(self) -> ir.Function:
        code = Code(self._module, "fill_store", 1, self._shape.lanes)
        code.function.linkage = "internal"
        fields = code.function.args[0]
        tokens = code.integer(fields, Field.TOKENS)
        with code.shared_rows(fields, Field.STORE_COUNTER, tokens, PIECE) as token:
            at = code.place(code.address(fields, Field.PLACES), code.times(token, 2))
            node, place = self._node(code, fields, code.integer(at, 0)), code.integer(at, 1)
            distance = code.integer(node, 2)
            for number, (source, step) in enumerate(((Field.KEY, Field.KEY_STEP), (Field.VALUE, Field.VALUE_STEP))):
                come = code.at(code.address(fields, source), code.times(token, code.integer(fields, step)))
                go = code.at(code.address(node, number), code.times(place, self.size))
                with code.loop(self.heads) as head:
                    for offset in range(0, self.size, code.lanes):
                        moved = code.row(come, code.plus(code.times(head, self.size), offset))
                        code.put(moved, go, code.plus(code.times(head, distance), offset))
        code.end()
        return code.function

    def _look(self) -> ir.Function:
        code = Code(self._module, "fill_look", 1, self._shape.lanes)
        code.function.linkage = "internal"
        fields = code.function.args[0]
        with code.work(code.place(fields, Field.LOOK_COUNTER), code.integer(fields, Field.LOOKS)) as number:
            item = code.place(code.address(fields, Field.ITEMS), code.times(number, len(Item)))
            self._block(code, fields, item)
        code.end()
        return code.function

    def _block(self, code: Code, fields: Value, item: Value) -> None:
        group, size = self.group, self.size
        head, first, place = (code.integer(item, field) for field in (Item.HEAD, Item.TOKEN, Item.PLACE))
        last, own = code.minus(code.integer(item, Item.COUNT), 1), code.integer(item, Item.OWN)
        border = code.minus(place, code.rest(place, tokens_of_block(self._shape)))

        def token(row: Value) -> Value:
            """Rows behind the last token's repeat those of the last."""
            return code.least(code.over(row, group), last)

        def begin(row: Value) -> Value:
            """Where a row's head begins among those of its token."""
            return code.times(code.plus(code.times(head, group), code.rest(row, group)), size)

        def query(row: Value) -> Value:
            at = code.times(code.plus(first, token(row)), code.integer(fields, Field.QUERY_STEP))
            return code.at(code.address(fields, Field.QUERY), code.plus(at, begin(row)))

        def out(row: Value) -> Value:
            at = code.times(code.plus(first, token(row)), self.heads * group * size)
            return code.at(code.address(fields, Field.OUT), code.plus(at, begin(row)))

        queries = Queries(code, size, self._shape.vectors)
        queries.lay(query, self._shape.scale)
        lengths = code.address(fields, Field.LENGTHS)
        with code.loop(code.plus(own, 1), code.integer(item, Item.FIRST)) as stretch:
            whole = code.build.icmp_signed("<", stretch, own)
            stop = code.build.select(whole, code.integer(lengths, stretch), border)
            queries.look(*self._keys(code, fields, stretch, head), 0, stop)
        stop = code.plus(place, last, 1)
        queries.look(*self._keys(code, fields, own, head), border, stop, lambda row: code.plus(place, token(row)))
        queries.take(out, divided=True)

    def _node(self, code: Code, fields: Value, stretch: Value) -> Value:
        return code.place(code.address(fields, Field.NODES), code.times(stretch, 3))

    def _keys(self, code: Code, fields: Value, stretch: Value, head: Value) -> tuple[Value, Value]:
        """Keys and values [T, d] of a head."""
        node = self._node(code, fields, stretch)
        offset = code.times(head, code.integer(node, 2))
        return code.at(code.address(node, 0), offset), code.at(code.address(node, 1), offset)
