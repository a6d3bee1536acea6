"""Attention of a step's tail tokens, compiled for one size of heads and the CPU at hand.

Two kernels, one after the other: `look` (and meanwhile new keys and values are stored), then `finish`. They read a
table (`table.Field`) and take work from a counter in it until there is none, so that any number of threads may run
them at once. A row's numbers depend neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

from ctypes import CFUNCTYPE, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import binding, ir

from lm_service.engine.packed.native.code import Code
from lm_service.engine.packed.native.finish import Finish
from lm_service.engine.packed.native.heads import Heads
from lm_service.engine.packed.native.look import Look
from lm_service.engine.packed.native.table import Field

_TASK = CFUNCTYPE(None, c_void_p)


@dataclass(frozen=True)
class Kernels:
    """Compiled for `heads`."""

    heads: Heads
    attend: Any  # a function of a pointer to the table: both kernels
    engine: Any  # keeps the code in memory


def supported(head_dim: int) -> bool:
    """Whether there are kernels for heads of this size."""
    return head_dim % 4 == 0 and 8 <= head_dim <= 256


@lru_cache
def compiled(head_dim: int, group: int, kv_heads: int) -> Kernels:
    """The kernels for such heads; compiled at the first call, which takes a part of a second."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    lanes, vectors = (16, 4) if features.get("avx512f") else (8, 2) if features.get("avx2") else (4, 4)
    while head_dim % lanes:
        lanes //= 2
    heads = Heads(head_dim, group, kv_heads, lanes, vectors)
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=2
    )
    module = binding.parse_assembly(str(_module(heads)))
    _passes().run(module, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return Kernels(heads, _TASK(engine.get_function_address("attend")), engine)


def _passes() -> binding.ModulePassManager:
    """What this code gains by. It is written in vectors and unrolled: all that -O3 does takes five times as long and
    makes it no faster."""
    passes = binding.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    passes.add_loop_rotate_pass()
    passes.add_new_gvn_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    return passes


def _module(heads: Heads) -> ir.Module:
    module = ir.Module("attention")
    look, finish = Look(module, heads).write(), Finish(module, heads).write()
    code = Code(module, "attend", 1, heads.lanes)
    fields, build = code.function.args[0], code.build
    build.call(look, [fields])
    barrier = code.integer(fields, Field.BARRIER)
    with build.if_then(build.icmp_signed("!=", barrier, code.whole(0))):
        build.call(build.inttoptr(barrier, ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
    build.call(finish, [fields])
    code.end()
    return module
