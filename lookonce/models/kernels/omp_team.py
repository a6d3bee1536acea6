"""Running compiled code on the threads that torch itself computes with.

A team of its own would compete with torch's, whose threads wait awake between two products
(see lookonce/models/omp_thread.py).
GOMP_parallel is what compilers make of `#pragma omp parallel`: it runs a function in every thread of the caller's team.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

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
