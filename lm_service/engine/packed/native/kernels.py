"""Attention of a step's tail tokens, compiled for one size of heads and the CPU at hand.

Two kernels, one after the other: `look` (and meanwhile new keys and values are stored), then `finish`. They read a
table (`table.Field`) and take work from a counter in it until there is none, so that any number of threads may run
them at once. A row's numbers depend neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import ir

from lm_service.engine.packed.native.finish import Finish
from lm_service.engine.packed.native.heads import Heads
from lm_service.engine.packed.native.look import Look
from lm_service.engine.packed.native.table import Field
from lookonce.native.code import Code
from lookonce.native.compiling import VECTORS, Compiled, lanes_for


@dataclass(frozen=True)
class Kernels:
    """Compiled for `heads`."""

    heads: Heads
    attend: Any  # a function of a pointer to the table: both kernels
    code: Compiled


def supported(head_dim: int) -> bool:
    """Whether there are kernels for heads of this size."""
    return head_dim % 4 == 0 and 8 <= head_dim <= 256


@lru_cache
def compiled(head_dim: int, group: int, kv_heads: int) -> Kernels:
    """The kernels for such heads; compiled at the first call."""
    heads = Heads(head_dim, group, kv_heads, lanes_for(head_dim), VECTORS)
    code = Compiled(lambda module: _write(module, heads))
    return Kernels(heads, code.task("attend"), code)


def _write(module: ir.Module, heads: Heads) -> None:
    look, finish = Look(module, heads).write(), Finish(module, heads).write()
    code = Code(module, "attend", 1, heads.lanes)
    fields, build = code.function.args[0], code.build
    build.call(look, [fields])
    barrier = code.integer(fields, Field.BARRIER)
    with build.if_then(build.icmp_signed("!=", barrier, code.whole(0))):
        build.call(build.inttoptr(barrier, ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
    build.call(finish, [fields])
    code.end()
