"""The online softmax of a query head while it is computed: in registers, and the heads of a group in memory."""

from __future__ import annotations

from lookonce.models.kernels.code import FLOAT, Code, Value
from lookonce.models.kernels.queries import NEVER


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
