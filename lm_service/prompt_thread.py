"""The thread that long prompts are built in, one after the other: others' answers keep the event loop and all cores but
one, and no more than one prompt's memory is needed at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class PromptThread:
    """Runs calls in turn. Whoever is cancelled while it waits costs nothing."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the call returns, or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))

    def close(self) -> None:
        """Begin nothing more; the call under way ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
