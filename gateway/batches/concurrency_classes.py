"""How many batch lines may be under way: fewer while others wait for answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

LOOK = 0.1  # seconds after which a waiting line looks again whether others have their answers


class ConcurrencyClasses:
    """`limit` lines at once while nobody else is served, one while somebody is, none while draining."""

    def __init__(self, limit: int, interactive: Callable[[], int]) -> None:
        self._limit = limit
        self._interactive = interactive  # requests of others under way
        self._turn = asyncio.Lock()  # first come, first served
        self._freed = asyncio.Event()
        self.busy = 0
        self.closed = False

    async def enter(self) -> None:
        """Take a place, once there is one."""
        async with self._turn:
            while self.closed or self.busy >= (1 if self._interactive() else self._limit):
                self._freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK):
                        await self._freed.wait()
            self.busy += 1

    def leave(self) -> None:
        """Give the place back."""
        self.busy -= 1
        self._freed.set()

    async def empty(self) -> None:
        """Return when no line is under way."""
        while self.busy:
            self._freed.clear()
            await self._freed.wait()
