"""A service's process: how its threads wait, the memory it keeps at hand, what its garbage collector need not look at,
and its end without taking the interpreter apart."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 256 << 20
_SPINS = "300"  # of libgomp's waiting loop
_LARGE_BYTES = (64 << 20, 32 << 20)
"""From this size on memory comes from the system and goes back to it; the second where the first is refused."""


def wait_briefly() -> None:
    """Let OpenMP's threads sleep when there has been nothing to do for some microseconds. By default those of libgomp
    wait awake for milliseconds, and take the cores from a service beside this one. Call it before torch is imported;
    OMP_WAIT_POLICY or GOMP_SPINCOUNT, where an operator has set one, stays as it is."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def keep_freed_memory() -> None:
    """Let the allocator keep what a step frees for the next one. By default glibc gives larger pieces back at once, and
    getting them again costs a fault for each page. Call it when the model is loaded; nothing happens without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGE_BYTES)


@contextmanager
def heap_frozen() -> Iterator[None]:
    """While the block runs, the garbage collector leaves alone what is there now: modules and a model, some hundred
    thousand objects that stay for good. Walking them takes 0.1 s, in which no thread has Python's lock. What is made in
    the block is collected as ever. Enter it when everything is built; blocks for about as long as one such walk."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # for whoever goes on in this process, such as a test


def leave_after(main: Callable[[], object]) -> NoReturn:
    """Call `main`, a command line that ends in SystemExit, and leave with its status.

    Any other exception passes through, for the interpreter to print.
    """
    try:
        main()
    except SystemExit as end:
        leave(end.code)
    leave(0)


def leave(status: int | str | None) -> NoReturn:
    """End the process as `sys.exit(status)` does, but after flushing logs, stdout and stderr leave the rest to the
    operating system: freeing modules, tensors and gRPC's threads one by one takes seconds and helps nobody.

    Stores must be closed by now, and nothing may count on atexit.
    """
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the reader is gone, or the stream was closed
            continue
    os._exit(status or 0)
