"""The end of a service's process: at once when its work is done, without taking the interpreter apart."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn


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
