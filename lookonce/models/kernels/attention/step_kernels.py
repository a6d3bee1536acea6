"""Attention of a step's tokens, compiled for one size of heads and the CPU at hand.

For suffixes two kernels, one after the other: `attend_shared` (and meanwhile new keys and values are stored), then
`attend_own`; for prefixes `prefill`. They read a struct (`structs`) and take work from a counter in it until there is
none, so that any number of threads may run them at once. A row's numbers depend neither on the rows beside it nor on
the number of threads.
"""

from __future__ import annotations

from functools import lru_cache

from llvmlite import ir

from lookonce.models.kernels import program
from lookonce.models.kernels.attention.attend_own import AttendOwn
from lookonce.models.kernels.attention.attend_shared import AttendShared
from lookonce.models.kernels.attention.prefill import PrefixPrefill
from lookonce.models.kernels.attention.step_structs import Heads, SuffixAttention
from lookonce.models.kernels.code import Code
from lookonce.models.kernels.compiling import VECTORS, Compiled, compiled_or_none, lanes_for
from lookonce.models.kernels.structs import Structs


class AttentionKernels:
    """Compiled for `heads`."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        self._code = Compiled(lambda module: _write(module, heads))
        self.attend = self._code.address("attend")
        """Address of a function of a pointer to a `SuffixAttention`: `attend_shared` and `attend_own`."""
        self.prefill = self._code.address("prefill")
        """Address of a function of a pointer to a `PrefillAttention`."""

    barrier = staticmethod(program.barrier)
    """What the structs' field of that name holds."""

    @staticmethod
    def run(calls: Structs) -> None:
        """Make calls, a `Call` each, one after the other."""
        program.run_program(calls, single_threaded=False)


def kernels_for(head_dim: int, group: int, kv_heads: int) -> AttentionKernels | None:
    """The kernels for such heads, compiled at the first call; None where there are none."""
    heads = Heads(head_dim, group, kv_heads, lanes_for(head_dim), VECTORS)
    if head_dim % 4 or not 8 <= head_dim <= 256 or not heads.block_tokens:
        return None
    return compiled_or_none(lambda: _compiled(heads))


_compiled = lru_cache(AttentionKernels)


def _write(module: ir.Module, heads: Heads) -> None:
    shared, own = AttendShared(module, heads).write(), AttendOwn(module, heads).write()
    code = Code(module, "attend", 1, heads.lanes)
    code.call_in_turn((shared, own), code.function.args[0], SuffixAttention.barrier)
    code.end()
    PrefixPrefill(module, heads).write()
