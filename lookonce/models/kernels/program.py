"""Kernels called one after the other, with no Python between them: it has its lock back only at the end."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from lookonce.models.kernels.code import POINTER, Code
from lookonce.models.kernels.compiling import Compiled
from lookonce.models.kernels.omp_team import barrier, run

Ints = npt.NDArray[np.int64]
Call = tuple[int, Sequence[int] | Ints]
"""The address of a function of a pointer to a table, and the table."""


class _Field(IntEnum):
    COUNT = 0
    CALLS = 1  # pointer to int64 [COUNT, 2]: the address of a function of a pointer, and the pointer
    BARRIER = 2  # pointer to a function that returns when all threads have called it; 0 for a lone thread


def run_program(calls: Ints, *, alone: bool) -> None:
    """Call functions of addresses int64 [n, 2], each when all threads have ended the one before. `alone`: in this
    thread."""
    calls = np.ascontiguousarray(calls)
    table = np.array((len(calls), calls.ctypes.data, 0 if alone else barrier()), dtype=np.int64)
    run(_program()[1], table.ctypes.data, alone=alone)


def run_calls(calls: Sequence[Call], *, alone: bool) -> None:
    """The same of calls."""
    tables = np.zeros((len(calls), max(len(fields) for _, fields in calls)), dtype=np.int64)
    for table, (_, fields) in zip(tables, calls, strict=True):
        table[: len(fields)] = fields
    functions = np.array([function for function, _ in calls])
    run_program(np.stack([functions, row_addresses(tables)], axis=1), alone=alone)


def row_addresses(table: Ints) -> Ints:
    """Where its rows begin."""
    return table.ctypes.data + table.strides[0] * np.arange(len(table))


@lru_cache
def _program() -> tuple[Compiled, Any]:
    code = Compiled(_write)
    return code, code.task("program")


def _write(module: ir.Module) -> None:
    code = Code(module, "program", 1, 4)
    fields, build = code.function.args[0], code.build
    calls, wait = code.address(fields, _Field.CALLS), code.integer(fields, _Field.BARRIER)
    called = ir.FunctionType(ir.VoidType(), [POINTER]).as_pointer()
    with code.loop(code.integer(fields, _Field.COUNT)) as number:
        at = code.times(number, 2)
        build.call(build.inttoptr(code.integer(calls, at), called), [code.address(calls, code.plus(at, 1))])
        code.wait(wait)
    code.end()
