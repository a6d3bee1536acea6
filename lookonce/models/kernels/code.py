"""Writing LLVM's intermediate code: loops, vectors of float32 and their arithmetic, in as few words as kernels need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from lookonce.models.kernels.structs import Field, Struct

BYTE, INT, FLOAT, POINTER = ir.IntType(8), ir.IntType(64), ir.FloatType(), ir.PointerType()
Value = Any  # llvmlite has no types of its own

LOG2_E = math.log2(math.e)  # e to the power of x is 2 to the power of x times that

_UNALIGNED = 4
_LEAST_EXPONENT = -126.0  # 2 to this is the least normal float32
_LARGE = 12582912.0  # 1.5 * 2^23
_SERIES = (1.3264727065e-3, 9.6715126489e-3, 5.5507337437e-2, 2.4022242085e-1, 6.9314697760e-1, 1.0)


class Code:
    """One function while it is written. Integers are 64 bits wide, `lanes` float32 make a vector."""

    def __init__(self, module: ir.Module, name: str, parameters: int | Sequence[ir.Type], lanes: int) -> None:
        """A function of so many pointers, or of other kinds, that returns nothing."""
        kinds = [POINTER] * parameters if isinstance(parameters, int) else parameters
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
        self.function, self.lanes = function, lanes
        self.vector = ir.VectorType(FLOAT, lanes)
        self.module = module
        self._variables = function.append_basic_block("variables")
        self.build = ir.IRBuilder(function.append_basic_block("begin"))
        self._begin = self.build.block

    def end(self) -> None:
        """Return, and be done."""
        self.build.ret_void()
        with self.build.goto_block(self._variables):
            self.build.branch(self._begin)

    # memory

    def variable(self, kind: ir.Type, initial: Value | None = None, count: int = 1) -> Value:
        """Room for `count` values on the stack; a lone one that is only read and set becomes a register."""
        with self.build.goto_block(self._variables):
            room = self.build.alloca(kind, count)
        room.type, room.align = POINTER, 64  # not a pointer to `kind`: what is read from it says its own
        if initial is not None:
            self.build.store(initial, room)
        return room

    def get(self, variable: Value, kind: ir.Type) -> Value:
        """The value of a variable."""
        return self.build.load(variable, typ=kind)

    def set(self, variable: Value, value: Value) -> None:
        """Give a variable a value."""
        self.build.store(value, variable)

    def place(self, base: Value, index: Value | int, kind: ir.Type = INT) -> Value:
        """Pointer to base[index] of integers, or another kind."""
        return self.build.gep(base, [self.whole(index)], source_etype=kind)

    def integer(self, base: Value, index: Value | int) -> Value:
        """base[index] of integers."""
        return self.build.load(self.place(base, index), typ=INT)

    def field(self, struct: Value, field: Field) -> Value:
        """What a field of the struct at a pointer holds: an integer, or a pointer."""
        held = self.integer(struct, field.place)
        return held if field.element is None else self.build.inttoptr(held, POINTER)

    def element(self, structs: Value, kind: type[Struct], index: Value) -> Value:
        """Pointer to structs[index]."""
        return self.place(structs, self.times(index, len(kind.fields)))

    def at(self, base: Value, index: Value | int) -> Value:
        """Pointer to base[index] of float32."""
        return self.place(base, index, FLOAT)

    def number(self, base: Value, index: Value | int = 0) -> Value:
        """base[index] of float32."""
        return self.build.load(self.at(base, index), typ=FLOAT)

    def put(self, value: Value, base: Value, index: Value | int = 0) -> None:
        """base[index] = value, a float32 or a vector that begins there."""
        self.build.store(value, self.at(base, index), align=_UNALIGNED)

    def row(self, base: Value, index: Value | int = 0) -> Value:
        """The vector that begins at base[index]."""
        return self.build.load(self.at(base, index), align=_UNALIGNED, typ=self.vector)

    # control

    @contextmanager
    def loop(self, stop: Value | int, start: Value | int = 0, step: int = 1) -> Iterator[Value]:
        """What is written in its body happens for start, start + step, ... below stop."""
        counter = self.variable(INT, self.whole(start))
        check, body, behind = (self.function.append_basic_block(name) for name in ("check", "body", "behind"))
        self.build.branch(check)
        self.build.position_at_end(check)
        now = self.get(counter, INT)
        self.build.cbranch(self.build.icmp_signed("<", now, self.whole(stop)), body, behind)
        self.build.position_at_end(body)
        yield now
        self.set(counter, self.build.add(now, self.whole(step)))
        self.build.branch(check)
        self.build.position_at_end(behind)

    @contextmanager
    def work(self, struct: Value, counter: Field, stop: Value) -> Iterator[Value]:
        """What is written in its body happens for each number below `stop` that this field of a struct hands out, in
        one of the threads that run this."""
        take, body, behind = (self.function.append_basic_block(name) for name in ("take", "work", "done"))
        self.build.branch(take)
        self.build.position_at_end(take)
        number = self.build.atomic_rmw("add", self.place(struct, counter.place), self.whole(1), "monotonic")
        self.build.cbranch(self.build.icmp_signed("<", number, stop), body, behind)
        self.build.position_at_end(body)
        yield number
        self.build.branch(take)
        self.build.position_at_end(behind)

    @contextmanager
    def shared_rows(self, struct: Value, counter: Field, count: Value, chunk: int) -> Iterator[Value]:
        """What is written in its body happens for each number below `count`, `chunk` of them at a time; the counter is
        that field of a struct."""
        chunks = self.over(self.plus(count, chunk - 1), chunk)
        with self.work(struct, counter, chunks) as number:
            first = self.times(number, chunk)
            with self.loop(self.least(self.plus(first, chunk), count), first) as row:
                yield row

    def call_in_turn(self, functions: Sequence[ir.Function], struct: Value, barrier: Field) -> None:
        """Call functions of a struct, each when all threads have ended the one before; that field holds the address of
        a function that waits for them, or 0."""
        wait = self.field(struct, barrier)
        for number, function in enumerate(functions):
            if number:
                self.wait(wait)
            self.build.call(function, [struct])

    def wait(self, barrier: Value) -> None:
        """Call the function at an address, which waits for all threads; 0: there is none."""
        with self.build.if_then(self.build.icmp_signed("!=", barrier, self.whole(0))):
            waiting = ir.FunctionType(ir.VoidType(), []).as_pointer()
            self.build.call(self.build.inttoptr(barrier, waiting), [])

    # integers

    @staticmethod
    def whole(value: Value | int) -> Value:
        """An integer, where it isn't one yet."""
        return ir.Constant(INT, int(value)) if isinstance(value, int) else value

    def plus(self, *values: Value | int) -> Value:
        """Their sum."""
        total = self.whole(values[0])
        for value in values[1:]:
            total = self.build.add(total, self.whole(value))
        return total

    def minus(self, left: Value | int, right: Value | int) -> Value:
        """left - right."""
        return self.build.sub(self.whole(left), self.whole(right))

    def times(self, *values: Value | int) -> Value:
        """Their product."""
        product = self.whole(values[0])
        for value in values[1:]:
            product = self.build.mul(product, self.whole(value))
        return product

    def over(self, left: Value | int, right: Value | int) -> Value:
        """left / right, rounded down, of numbers that are not negative."""
        return self.build.udiv(self.whole(left), self.whole(right))

    def rest(self, left: Value | int, right: Value | int) -> Value:
        """What `over` leaves."""
        return self.build.urem(self.whole(left), self.whole(right))

    def least(self, left: Value | int, right: Value | int) -> Value:
        """The smaller of two."""
        left, right = self.whole(left), self.whole(right)
        return self.build.select(self.build.icmp_signed("<", left, right), left, right)

    # float32 and vectors of it

    def constant(self, value: float, kind: ir.Type | None = None) -> Value:
        """A number, or a vector of it."""
        kind = kind or FLOAT
        return ir.Constant(kind, [value] * self.lanes if kind == self.vector else value)

    def spread(self, value: Value) -> Value:
        """A vector of one number."""
        empty = ir.Constant(self.vector, ir.Undefined)
        first = self.build.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
        return self.build.shuffle_vector(
            first, empty, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        )

    def multiply_add(self, left: Value, right: Value, added: Value) -> Value:
        """left * right + added, rounded once."""
        kind = left.type
        return self.build.call(self._intrinsic("llvm.fma", kind, kind, kind, kind), [left, right, added])

    def larger(self, left: Value, right: Value) -> Value:
        """The larger of two, lane by lane; the right one where either is no number."""
        return self.build.select(self.build.fcmp_ordered(">", left, right), left, right)

    def total(self, vector: Value) -> Value:
        """The sum of a vector's lanes."""
        add = self._intrinsic("llvm.vector.reduce.fadd", FLOAT, FLOAT, self.vector)
        return self.build.call(add, [self.constant(0.0), vector], fastmath=("reassoc",))

    def transposed(self, rows: list[Value]) -> list[Value]:
        """A square of as many vectors as each has lanes: what was lane j of row i is lane i of row j. Squares of half
        its size change places, and in each of them again."""
        distance = self.lanes // 2
        while distance:
            for place in range(self.lanes):
                if not place & distance:
                    upper, lower = rows[place], rows[place + distance]
                    rows[place] = self._mixed(upper, lower, 0, distance)
                    rows[place + distance] = self._mixed(upper, lower, distance, distance)
            distance //= 2
        return rows

    def _mixed(self, upper: Value, lower: Value, begin: int, distance: int) -> Value:
        """Of each pair of neighbouring runs of so many lanes one: of `upper`, then of `lower`; the first or the second
        of its own pair."""
        taken = [
            lane + begin if not lane & distance else self.lanes + lane - distance + begin for lane in range(self.lanes)
        ]
        return self.build.shuffle_vector(upper, lower, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), taken))

    def root(self, x: Value) -> Value:
        """The square root."""
        return self.build.call(self._intrinsic("llvm.sqrt", x.type, x.type), [x])

    def power(self, x: Value) -> Value:
        """2 to the power of x <= 0, lane by lane: relative error below 2e-7, never zero; NaN stays.

        x is rounded by adding a number so large that its last place counts ones: its lowest bits are then x's whole
        part and the exponent's bias, and are moved to the exponent. The series is 2^x's for the rest, of the least
        relative error between -1/2 and 1/2 that so many terms have.
        """
        kind, build = x.type, self.build
        x = self.larger(self.constant(_LEAST_EXPONENT, kind), x)
        large = self.constant(_LARGE + 127, kind)
        rounded = build.fadd(x, large)
        rest = build.fsub(x, build.fsub(rounded, large))
        series = self.constant(_SERIES[0], kind)
        for term in _SERIES[1:]:
            series = self.multiply_add(series, rest, self.constant(term, kind))
        bits = ir.VectorType(ir.IntType(32), self.lanes) if kind == self.vector else ir.IntType(32)
        whole = build.shl(build.bitcast(rounded, bits), _each(bits, 23, self.lanes))
        return build.fmul(series, build.bitcast(whole, kind))

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + e to the power of -x), of a vector; never overflows."""
        build, one, zero = self.build, self.constant(1.0, self.vector), self.constant(0.0, self.vector)
        turned = build.fmul(x, self.constant(LOG2_E, self.vector))
        negative = build.fcmp_ordered("<", turned, zero)
        small = self.power(build.select(negative, turned, build.fneg(turned)))
        return build.fdiv(build.select(negative, small, one), build.fadd(one, small))

    def quick_gelu(self, x: Value) -> Value:
        """x * sigmoid(1.702 x), of a vector."""
        return self.build.fmul(x, self.sigmoid(self.build.fmul(x, self.constant(1.702, self.vector))))

    def _intrinsic(self, name: str, result: ir.Type, *operands: ir.Type) -> Value:
        """LLVM's own function of that name for operands of which the last says the kind."""
        name += f".v{self.lanes}f32" if operands[-1] == self.vector else ".f32"
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, operands), name)


def _each(kind: ir.Type, value: int, lanes: int) -> Value:
    return ir.Constant(kind, [value] * lanes if isinstance(kind, ir.VectorType) else value)
