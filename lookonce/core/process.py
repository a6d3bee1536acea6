"""A service's process: how its threads wait, the memory it keeps at hand, what its garbage collector need not look at,
why it can't start, and its end without taking the interpreter apart."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol

import structlog

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.telemetry import tracing

PERMANENT_EXIT = 78
"""Exit status of a process that can't start as it is configured (EX_CONFIG of sysexits.h): trying again can't help."""
USAGE_EXIT = 2
"""Exit status of a mistyped flag or a bad value of a setting: neither can here."""

_PASSING = frozenset(
    {
        ErrorKind.RATE_LIMITED,
        ErrorKind.OVERLOADED,
        ErrorKind.UNAVAILABLE,
        ErrorKind.DEADLINE_EXCEEDED,
        ErrorKind.CANCELLED,
        ErrorKind.INTERNAL,
    }
)
"""Kinds of failure that may be gone at the next attempt."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 256 << 20
_MATRIX_BYTES = 1 << 20
_SPINS = "300"  # of libgomp's waiting loop
_LARGE_BYTES = (64 << 20, 32 << 20)
"""From this size on memory comes from the system and goes back to it; the second where the first is refused."""


def wait_briefly() -> None:
    """Let OpenMP's threads sleep when there has been nothing to do for some microseconds. By default those of libgomp
    wait awake for milliseconds, and take the cores from a service beside this one. Call it before torch is imported;
    OMP_WAIT_POLICY or GOMP_SPINCOUNT, where an operator has set one, stays as it is."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def return_freed_memory() -> None:
    """Let the allocator give a matrix that is freed back to the system at once. By default glibc does so with those
    that are larger than any freed before, and the holes that others leave fit no matrix of another size. Call it before
    a model is loaded, whose matrices are laid out anew one by one; nothing happens without glibc."""
    _mallopt(_M_MMAP_THRESHOLD, _MATRIX_BYTES)


def keep_freed_memory() -> None:
    """Let the allocator keep what a step frees for the next one. By default glibc gives larger pieces back at once, and
    getting them again costs a fault for each page. Call it when the model is loaded; nothing happens without glibc."""
    _mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    any(_mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGE_BYTES)


def _mallopt(parameter: int, value: int) -> bool:
    """Whether the C library has such a setting and takes the value."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(parameter, value))


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


class Traced(Protocol):
    """Settings that say where traces go."""

    @property
    def trace_endpoint(self) -> str | None:
        """OTLP over gRPC; None: nowhere."""

    @property
    def trace_share(self) -> float:
        """Of the traces that begin here, 0 to 1."""


def serve_to_end(service: str, settings: Traced, serve: Callable[[], None]) -> int:
    """Run `serve`, which returns after a drain, with its traces sent; the process's exit status. What keeps it from
    starting or going on goes to the log and, as a sentence, to the last line of stderr."""
    try:
        tracing.export_spans(service, settings.trace_endpoint, share=settings.trace_share)
        serve()
        return 0
    except LookonceError as error:
        failure = error
    finally:
        tracing.flush_spans()
    structlog.get_logger(service).error("ended by an error", kind=failure.kind.value, reason=failure.message)
    print(f"{service}: error: {failure.message}", file=sys.stderr, flush=True)
    return 1 if failure.kind in _PASSING else PERMANENT_EXIT


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
