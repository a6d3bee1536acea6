"""`attend_own`: each token's own suffix, online over blocks of keys, merged with what `attend_shared` found by its
log-sum-exp."""

from __future__ import annotations

from llvmlite import ir

from lookonce.models.kernels.attention.step_structs import CHUNK, Heads, SharedSplit, SuffixAttention
from lookonce.models.kernels.code import BYTE, FLOAT, Code, Value
from lookonce.models.kernels.queries import KEYS, NEVER


class Row:
    """The online softmax of one query head, in registers."""

    def __init__(self, code: Code, query: list[Value], maximum: Value, total: Value, out: list[Value]) -> None:
        """Values of now: the scaled query, the highest score, the sum of weights and of weighted values."""
        self._code, self.query = code, query
        self.maximum, self.total = code.variable(FLOAT, maximum), code.variable(FLOAT, total)
        self.out = [code.variable(code.vector, value) for value in out]

    def fade(self, share: Value, added: Value) -> None:
        """Scale sum and output, and add to the sum."""
        code = self._code
        code.set(self.total, code.multiply_add(code.get(self.total, FLOAT), share, added))
        wide = code.spread(share)
        for variable in self.out:
            code.set(variable, code.build.fmul(code.get(variable, code.vector), wide))


class State:
    """The online softmaxes of all query heads of a group, in memory."""

    def __init__(self, code: Code, size: int, group: int) -> None:
        self._code, self._size, self._group = code, size, group
        self.queries = code.variable(FLOAT, count=group * size)
        self._out = code.variable(FLOAT, count=group * size)
        self._maxima, self._totals = code.variable(FLOAT, count=group), code.variable(FLOAT, count=group)

    def clear(self) -> None:
        """Nothing seen yet."""
        code = self._code
        with code.loop(self._group) as member:
            code.put(code.constant(NEVER), self._maxima, member)
            code.put(code.constant(0.0), self._totals, member)
        with code.loop(self._group * self._size, step=code.lanes) as place:
            code.put(code.constant(0.0, code.vector), self._out, place)

    def load(self, member: Value) -> Row:
        """One of them."""
        code = self._code
        places = [code.plus(code.times(member, self._size), at) for at in range(0, self._size, code.lanes)]
        return Row(
            code,
            [code.row(self.queries, place) for place in places],
            code.number(self._maxima, member),
            code.number(self._totals, member),
            [code.row(self._out, place) for place in places],
        )

    def store(self, member: Value, row: Row) -> None:
        """Keep it."""
        code = self._code
        code.put(code.get(row.maximum, FLOAT), self._maxima, member)
        code.put(code.get(row.total, FLOAT), self._totals, member)
        for at, variable in enumerate(row.out):
            place = code.plus(code.times(member, self._size), at * code.lanes)
            code.put(code.get(variable, code.vector), self._out, place)


class AttendOwn:
    """Writes the kernel: a function `attend_own` of a pointer to a `SuffixAttention`."""

    def __init__(self, module: ir.Module, heads: Heads) -> None:
        self._module, self._shape = module, heads
        self.size, self.group, self.heads, self.lanes = heads.size, heads.group, heads.kv_heads, heads.lanes

    def write(self) -> ir.Function:
        """Take tokens' heads."""
        code = Code(self._module, "attend_own", 1, self.lanes)
        code.function.linkage = "internal"
        step = code.function.args[0]
        begin = code.times(code.field(step, SuffixAttention.begin), self.heads)
        end = code.times(code.field(step, SuffixAttention.end), self.heads)
        with code.shared_rows(step, SuffixAttention.own_counter, code.minus(end, begin), CHUNK) as number:
            pair = code.plus(begin, number)
            self._attend_head(code, step, code.over(pair, self.heads), code.rest(pair, self.heads))
        code.end()
        return code.function

    def _attend_head(self, code: Code, step: Value, token: Value, head: Value) -> None:
        """The outputs of one token's query heads that share a key-value head."""
        build, places = code.build, range(0, self.size, self.lanes)
        begin = code.times(code.times(head, self.group), self.size)
        query = code.at(
            code.field(step, SuffixAttention.query),
            code.plus(code.times(token, code.field(step, SuffixAttention.query_step)), begin),
        )
        state = State(code, self.size, self.group)
        with code.loop(self.group * self.size, step=self.lanes) as place:
            scaled = build.fmul(code.row(query, place), code.constant(self._shape.scale, code.vector))
            code.put(scaled, state.queries, place)
        state.clear()
        self._own_suffix(code, step, token, head, state)
        target = code.at(
            code.field(step, SuffixAttention.out),
            code.plus(code.times(token, self.heads * self.group * self.size), begin),
        )
        with code.loop(self.group) as member:
            row = state.load(member)
            self._merge_partials(code, step, token, head, member, row)
            share = code.spread(build.fdiv(code.constant(1.0), code.get(row.total, FLOAT)))
            for variable, place in zip(row.out, places, strict=True):
                found = build.fmul(code.get(variable, code.vector), share)
                code.put(found, target, code.plus(code.times(member, self.size), place))

    def _own_suffix(self, code: Code, step: Value, token: Value, head: Value, state: State) -> None:
        build = code.build
        visible = code.integer(code.field(step, SuffixAttention.visible), token)
        rows = code.field(step, SuffixAttention.pool_rows)
        row = code.plus(code.integer(rows, code.plus(code.times(token, self.heads), head)), 1)
        begin = code.times(code.minus(row, visible), self.size)
        keys = code.at(code.field(step, SuffixAttention.pool_keys), begin)
        values = code.at(code.field(step, SuffixAttention.pool_values), begin)
        mask_row = code.integer(code.field(step, SuffixAttention.mask_rows), token)
        begin = code.times(mask_row, code.field(step, SuffixAttention.mask_width))
        mask = code.place(code.field(step, SuffixAttention.masks), begin, BYTE)
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
        """One query head over up to KEYS keys of the suffix."""
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

    def _merge_partials(self, code: Code, step: Value, token: Value, head: Value, member: Value, row: Row) -> None:
        """Add what `attend_shared` found for a row in all chunks of all spans it sees."""
        build = code.build
        seen, splits = code.field(step, SuffixAttention.seen), code.field(step, SuffixAttention.splits)
        listed = code.field(step, SuffixAttention.seen_spans)
        number = code.plus(code.times(token, self.group), member)
        with code.loop(code.integer(seen, code.plus(token, 1)), code.integer(seen, token)) as place:
            split = code.element(splits, SharedSplit, code.integer(listed, place))
            within = code.minus(number, code.field(split, SharedSplit.first_row))
            height = code.field(split, SharedSplit.height)
            block, lane = code.over(within, height), code.rest(within, height)
            chunks, blocks = code.field(split, SharedSplit.chunks), code.field(split, SharedSplit.blocks)
            size = code.times(height, self.size + 2)
            with code.loop(chunks) as chunk:
                item = code.plus(block, code.times(code.plus(code.times(head, chunks), chunk), blocks))
                begin = code.plus(code.field(split, SharedSplit.place), code.times(item, size))
                partial = code.at(code.field(step, SuffixAttention.partial), begin)
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
