"""Work on bodies that would keep the event loop from others: done in one thread, so that it takes turns with the loop
alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

SMALL = 1 << 15
"""Bytes that are worked on at once."""
P = ParamSpec("P")
T = TypeVar("T")
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="bodies")


async def aside(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns for something of `size` bytes."""
    if size <= SMALL:
        return function(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_THREAD, lambda: function(*args, **kwargs))
