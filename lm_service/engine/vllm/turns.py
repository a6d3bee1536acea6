"""Who may compute with whom: requests that share, requests that must be alone, and the first to compute a prefix."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager


class Turns:
    """Any number of holders that share, or one that is alone; in the order of arrival."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()  # held by one that waits to be alone, and while it is
        self._sharing = 0
        self._none_shares = asyncio.Event()
        self._none_shares.set()

    @property
    def idle(self) -> bool:
        """Whether nobody holds anything or waits for it."""
        return not self._sharing and not self._door.locked()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Beside others that share."""
        async with self._door:
            self._sharing += 1
            self._none_shares.clear()
        try:
            yield
        finally:
            self._sharing -= 1
            if not self._sharing:
                self._none_shares.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Beside nobody."""
        async with self._door:
            await self._none_shares.wait()
            yield


class Firsts:
    """One computes a prefix, those that need it too wait until it is there. vLLM shares KV with requests that come
    after a prefix was computed, not with those in the same step."""

    def __init__(self, most: int) -> None:
        """`most`: prefixes that are remembered to have been computed."""
        self._most = most
        self._computed: OrderedDict[Hashable, None] = OrderedDict()
        self._under_way: dict[Hashable, asyncio.Event] = {}

    @asynccontextmanager
    async def turn(self, prefix: Hashable | None) -> AsyncIterator[Callable[[], None]]:
        """Enter once the prefix is computed or nobody computes it. Call what is given when it has been computed."""
        while prefix in self._under_way:
            await self._under_way[prefix].wait()
        if prefix is None or prefix in self._computed:
            yield lambda: None
            return
        over = self._under_way[prefix] = asyncio.Event()

        def computed() -> None:
            if self._under_way.get(prefix) is over:
                del self._under_way[prefix]
                over.set()
                self._computed[prefix] = None
                while len(self._computed) > self._most:
                    self._computed.popitem(last=False)

        try:
            yield computed
        finally:
            if self._under_way.get(prefix) is over:
                del self._under_way[prefix]
                over.set()

    def forget(self, affected: Callable[[Hashable], bool]) -> int:
        """Those that are affected are computed no longer: how many."""
        gone = [prefix for prefix in self._computed if affected(prefix)]
        for prefix in gone:
            del self._computed[prefix]
        return len(gone)
