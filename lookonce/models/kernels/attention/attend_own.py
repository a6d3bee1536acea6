"""`finish`: each token's own tail, online over blocks of keys, merged with what `look` found by its log-sum-exp."""

from __future__ import annotations

from llvmlite import ir

from lookonce.models.kernels.attention.heads import PIECE, Heads
from lookonce.models.kernels.attention.online import Row, State
from lookonce.models.kernels.attention.table import Field, Part
from lookonce.models.kernels.code import BYTE, FLOAT, Code, Value
from lookonce.models.kernels.queries import KEYS, NEVER


class Finish:
    """Writes the kernel: a function `finish` of a pointer to the table."""

    def __init__(self, module: ir.Module, heads: Heads) -> None:
        self._module, self._shape = module, heads
        self.size, self.group, self.heads, self.lanes = heads.size, heads.group, heads.kv_heads, heads.lanes

    def write(self) -> ir.Function:
        """Take tokens' heads."""
        code = Code(self._module, "finish", 1, self.lanes)
        code.function.linkage = "internal"
        fields = code.function.args[0]
        begin = code.times(code.integer(fields, Field.BEGIN), self.heads)
        end = code.times(code.integer(fields, Field.END), self.heads)
        with code.shared_rows(fields, Field.FINISH_COUNTER, code.minus(end, begin), PIECE) as number:
            pair = code.plus(begin, number)
            self._finish_head(code, fields, code.over(pair, self.heads), code.rest(pair, self.heads))
        code.end()
        return code.function

    def _finish_head(self, code: Code, fields: Value, token: Value, head: Value) -> None:
        """The outputs of one token's query heads that share a key-value head."""
        build, places = code.build, range(0, self.size, self.lanes)
        begin = code.times(code.times(head, self.group), self.size)
        query = code.at(
            code.address(fields, Field.QUERY),
            code.plus(code.times(token, code.integer(fields, Field.QUERY_STEP)), begin),
        )
        state = State(code, self.size, self.group)
        with code.loop(self.group * self.size, step=self.lanes) as place:
            scaled = build.fmul(code.row(query, place), code.constant(self._shape.scale, code.vector))
            code.put(scaled, state.queries, place)
        state.clear()
        self._own_suffix(code, fields, token, head, state)
        target = code.at(
            code.address(fields, Field.OUT),
            code.plus(code.times(token, self.heads * self.group * self.size), begin),
        )
        with code.loop(self.group) as member:
            row = state.load(member)
            self._merge_partials(code, fields, token, head, member, row)
            share = code.spread(build.fdiv(code.constant(1.0), code.get(row.total, FLOAT)))
            for variable, place in zip(row.out, places, strict=True):
                found = build.fmul(code.get(variable, code.vector), share)
                code.put(found, target, code.plus(code.times(member, self.size), place))

    def _own_suffix(self, code: Code, fields: Value, token: Value, head: Value, state: State) -> None:
        build = code.build
        visible = code.integer(code.address(fields, Field.VISIBLE), token)
        rows = code.address(fields, Field.POOL_ROWS)
        row = code.plus(code.integer(rows, code.plus(code.times(token, self.heads), head)), 1)
        begin = code.times(code.minus(row, visible), self.size)
        keys = code.at(code.address(fields, Field.POOL_KEYS), begin)
        values = code.at(code.address(fields, Field.POOL_VALUES), begin)
        mask_row = code.integer(code.address(fields, Field.MASK_ROWS), token)
        begin = code.times(mask_row, code.integer(fields, Field.MASK_WIDTH))
        mask = code.place(code.address(fields, Field.MASKS), begin, BYTE)
        masked = build.icmp_signed(">=", mask_row, code.whole(0))
        with code.loop(visible, step=KEYS) as first:
            count = code.least(KEYS, code.minus(visible, first))
            block = code.at(keys, code.times(first, self.size)), code.at(values, code.times(first, self.size))
            with code.loop(self.group) as member:
                line = state.load(member)
                self._own_block(code, block, count, (masked, code.place(mask, first, BYTE)), line)
                state.store(member, line)

    def _own_block(
        self, code: Code, block: tuple[Value, Value], count: Value, mask: tuple[Value, Value], row: Row
    ) -> None:
        """One query head over up to KEYS keys of the tail."""
        build, lanes = code.build, self.lanes
        keys, values = block
        scores = code.variable(FLOAT, count=KEYS)
        with code.loop(KEYS, step=lanes) as place:
            code.put(code.constant(NEVER, code.vector), scores, place)
        before = code.get(row.maximum, FLOAT)
        with code.loop(count) as key:
            line = code.at(keys, code.times(key, self.size))
            products = build.fmul(row.query[0], code.row(line))
            for number, query in enumerate(row.query[1:], 1):
                products = code.multiply_add(query, code.row(line, number * lanes), products)
            score = code.variable(FLOAT, code.total(products))
            masked, seen = mask
            with build.if_then(masked, likely=False):
                byte = build.load(code.place(seen, key, BYTE), typ=BYTE)
                shown = build.icmp_signed("!=", byte, ir.Constant(BYTE, 0))
                code.set(score, build.select(shown, code.get(score, FLOAT), code.constant(NEVER)))
            found = code.get(score, FLOAT)
            code.put(found, scores, key)
            code.set(row.maximum, code.larger(code.get(row.maximum, FLOAT), found))
        highest = code.get(row.maximum, FLOAT)
        sums = code.variable(code.vector, code.constant(0.0, code.vector))
        with code.loop(count, step=lanes) as place:
            weight = code.power(build.fsub(code.row(scores, place), code.spread(highest)))
            code.put(weight, scores, place)
            code.set(sums, build.fadd(code.get(sums, code.vector), weight))
        row.fade(code.power(build.fsub(before, highest)), code.total(code.get(sums, code.vector)))
        with code.loop(count) as key:
            line = code.at(values, code.times(key, self.size))
            weight = code.spread(code.number(scores, key))
            for number, variable in enumerate(row.out):
                value = code.multiply_add(weight, code.row(line, number * lanes), code.get(variable, code.vector))
                code.set(variable, value)

    def _merge_partials(self, code: Code, fields: Value, token: Value, head: Value, member: Value, row: Row) -> None:
        """Add what `look` found for a row in all chunks of all stretches it sees."""
        build = code.build
        seen, parts = code.address(fields, Field.SEEN), code.address(fields, Field.PARTS)
        listed = code.address(fields, Field.SEEN_PARTS)
        number = code.plus(code.times(token, self.group), member)
        with code.loop(code.integer(seen, code.plus(token, 1)), code.integer(seen, token)) as place:
            part = code.place(parts, code.times(code.integer(listed, place), len(Part)))
            within = code.minus(number, code.integer(part, Part.FIRST_ROW))
            height = code.integer(part, Part.HEIGHT)
            block, lane = code.over(within, height), code.rest(within, height)
            chunks, blocks = code.integer(part, Part.CHUNKS), code.integer(part, Part.BLOCKS)
            size = code.times(height, self.size + 2)
            with code.loop(chunks) as chunk:
                item = code.plus(block, code.times(code.plus(code.times(head, chunks), chunk), blocks))
                begin = code.plus(code.integer(part, Part.PLACE), code.times(item, size))
                partial = code.at(code.address(fields, Field.PARTIAL), begin)
                other = code.number(partial, code.plus(lane, code.times(height, self.size)))
                weight = code.number(partial, code.plus(lane, code.times(height, self.size + 1)))
                before = code.get(row.maximum, FLOAT)
                highest = code.larger(before, other)
                mine, theirs = (code.power(build.fsub(score, highest)) for score in (before, other))
                code.set(row.maximum, highest)
                row.fade(mine, build.fmul(weight, theirs))
                begin, theirs = code.times(lane, self.size), code.spread(theirs)
                for at, variable in enumerate(row.out):
                    found = code.row(partial, code.plus(begin, at * self.lanes))
                    code.set(variable, code.multiply_add(found, theirs, code.get(variable, code.vector)))
