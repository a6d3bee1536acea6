"""Attention of a step's tokens, compiled for one size of heads and the CPU at hand.

For suffixes two kernels, one after the other: `look` (and meanwhile new keys and values are stored), then `finish`; for
prefixes `prefill`. They read a table (`table.Field`, `prefill_kernel.Field`) and take work from a counter in it until
there is none, so that any number of threads may run them at once. A row's numbers depend neither on the rows beside it
nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from llvmlite import ir

from lookonce.models.kernels.attention.attend_own import Finish
from lookonce.models.kernels.attention.attend_shared import Look
from lookonce.models.kernels.attention.heads import Heads
from lookonce.models.kernels.attention.prefill import PrefixPrefill, tokens_of_block
from lookonce.models.kernels.attention.table import Field
from lookonce.models.kernels.code import Code
from lookonce.models.kernels.compiling import VECTORS, Compiled, lanes_for


@dataclass(frozen=True)
class Kernels:
    """Compiled for `heads`."""

    heads: Heads
    attend: int  # address of a function of a pointer to `table.Field`: `look` and `finish`
    prefill: int  # address of a function of a pointer to `fill.Field`
    code: Compiled


def supported(head_dim: int, group: int) -> bool:
    """Whether there are kernels for such heads."""
    return head_dim % 4 == 0 and 8 <= head_dim <= 256 and tokens_of_block(_heads(head_dim, group, 1)) > 0


@lru_cache
def compiled(head_dim: int, group: int, kv_heads: int) -> Kernels:
    """The kernels for such heads; compiled at the first call."""
    heads = _heads(head_dim, group, kv_heads)
    code = Compiled(lambda module: _write(module, heads))
    return Kernels(heads, code.address("attend"), code.address("fill"), code)


def _heads(head_dim: int, group: int, kv_heads: int) -> Heads:
    return Heads(head_dim, group, kv_heads, lanes_for(head_dim), VECTORS)


def _write(module: ir.Module, heads: Heads) -> None:
    look, finish = Look(module, heads).write(), Finish(module, heads).write()
    code = Code(module, "attend", 1, heads.lanes)
    code.call_in_turn((look, finish), code.function.args[0], Field.BARRIER)
    code.end()
    PrefixPrefill(module, heads).write()
