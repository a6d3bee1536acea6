"""Kernels called one after the other, with no Python between them: it has its lock back only at the end.

They run on the threads that torch itself computes with: a team of their own would compete with those, which wait awake
between two products (see lookonce/models/omp_thread.py). GOMP_parallel is what compilers make of an OpenMP parallel
block: it runs a function in every thread of the caller's team.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir

from lookonce.models.kernels.code import POINTER, Code
from lookonce.models.kernels.compiling import Compiled
from lookonce.models.kernels.structs import Call, Struct, Structs, Words, address, integer, pointer

_LIBRARY = ctypes.CDLL(None)  # with what torch brings along: libgomp, on Linux
_PARALLEL = getattr(_LIBRARY, "GOMP_parallel", None)
_BARRIER: int = ctypes.cast(getattr(_LIBRARY, "GOMP_barrier", 0), ctypes.c_void_p).value or 0
if _PARALLEL is not None:
    _PARALLEL.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    _PARALLEL.restype = None


def threads() -> int:
    """How many `run` uses."""
    return torch.get_num_threads() if _PARALLEL is not None and _BARRIER else 1


def barrier() -> int:
    """Address of a function that returns when every thread of a team has called it; 0 where there is one thread."""
    return _BARRIER if threads() > 1 else 0


def run(task: Any, struct: int, *, single_threaded: bool = False) -> None:
    """Call a compiled function with a struct's address in each of the threads, or in this one only; back when all are.
    Python runs meanwhile."""
    count = 1 if single_threaded else threads()
    if count > 1 and _PARALLEL is not None:
        _PARALLEL(task, struct, count, 0)
    else:
        task(struct)


Kernel = tuple[int, Words]
"""The address of a function of a pointer to a struct, and the struct."""


class Program(Struct):
    """Calls, one after the other."""

    count = integer()
    calls = pointer(Call, "count")
    barrier = integer()  # address of a function that returns when all threads have called it; 0 for a lone thread


def run_program(calls: Structs, *, single_threaded: bool) -> None:
    """Make `calls` [n], each when all threads have ended the one before."""
    wait = 0 if single_threaded else barrier()
    program = Program.fill(Program.one(), count=len(calls), calls=np.ascontiguousarray(calls), barrier=wait)
    run(_program()[1], address(program), single_threaded=single_threaded)


def run_kernels(kernels: Sequence[Kernel], *, single_threaded: bool) -> None:
    """The same of kernels."""
    calls = Call.zeros(len(kernels))
    calls["function"] = [function for function, _ in kernels]
    calls["struct"] = [address(struct) for _, struct in kernels]
    run_program(calls, single_threaded=single_threaded)


@lru_cache
def _program() -> tuple[Compiled, Any]:
    code = Compiled(_write)
    return code, code.task("program")


def _write(module: ir.Module) -> None:
    code = Code(module, "program", 1, 4)
    program, build = code.function.args[0], code.build
    calls, wait = code.field(program, Program.calls), code.field(program, Program.barrier)
    called = ir.FunctionType(ir.VoidType(), [POINTER]).as_pointer()
    with code.loop(code.field(program, Program.count)) as number:
        call = code.element(calls, Call, number)
        struct = build.inttoptr(code.field(call, Call.struct), POINTER)
        build.call(build.inttoptr(code.field(call, Call.function), called), [struct])
        code.wait(wait)
    code.end()
