"""From LLVM's intermediate code to functions, for the CPU at hand."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, c_void_p
from platform import machine
from typing import Any, TypeVar

import structlog
from llvmlite import binding, ir

T = TypeVar("T")
_log = structlog.get_logger(__name__)

Task = CFUNCTYPE(None, c_void_p)  # what a kernel is called as: with the address of its table

binding.initialize_native_target()
binding.initialize_native_asmprinter()


def _features() -> binding.FeatureMap:
    try:
        return binding.get_host_cpu_features()
    except RuntimeError:  # LLVM can't tell them of every kind of CPU
        return binding.FeatureMap()


_FEATURES = _features()
LANES, VECTORS = (16, 4) if _FEATURES.get("avx512f") else (8, 2) if _FEATURES.get("avx2") else (4, 4)
"""Float32 of a vector, and how many of them a product of small tiles keeps side by side in registers."""

FUSED = bool(_FEATURES.get("fma")) or machine() in ("aarch64", "arm64")
"""Whether the CPU multiplies and adds in one instruction; without, each is a call of a function."""


def lanes_for(size: int) -> int:
    """The widest vector that `size` float32 are a multiple of."""
    lanes: int = LANES
    while size % lanes:
        lanes //= 2
    return lanes


class Compiled:
    """The functions of a module. The code is there for as long as this object is."""

    def __init__(self, write: Callable[[ir.Module], None]) -> None:
        """`write` fills the module. Takes a fifth of a second for large kernels."""
        written = ir.Module("lookonce")
        write(written)
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=_FEATURES.flatten(), opt=2
        )
        module = binding.parse_assembly(str(written))
        _passes().run(module, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
        self._engine = binding.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Of one of its functions."""
        found: int = self._engine.get_function_address(name)
        return found

    def task(self, name: str) -> Any:
        """One of its functions, to be called with a pointer."""
        return Task(self.address(name))


def compiled_or_none(make: Callable[[], T]) -> T | None:
    """What `make` compiles; None, and a line in the log, where that can't be done: then torch's operations serve."""
    try:
        return make()
    except (RuntimeError, OSError) as error:
        _log.warning("no compiled kernels on this machine", reason=str(error))
        return None


def _passes() -> binding.ModulePassManager:
    """What our code gains by. It is written in vectors and unrolled: all that -O3 does takes five times as long and
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
