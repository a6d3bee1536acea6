"""A store in this process's memory: the first tier of every service, and all there is with `memory://`.

Runs on one event loop; nothing here waits. Values are copied in unless they are immutable already, so that a view
into a mapped file is never pinned by being cached.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from lookonce.core.stores.interface import StoreMetrics, StoreStats, Value

ENTRY_OVERHEAD = 256
"""Bytes that an entry is charged beside its key and value (objects, table slots)."""


@dataclass(frozen=True, slots=True)
class _Entry:
    value: bytes
    cost: int  # bytes
    expires: float | None  # seconds on the store's clock


class MemoryStore:
    """At most `max_bytes`, least recently used out first; values live `ttl` seconds (None: until evicted). Without
    `evicts` nothing goes before its time: what has no room is refused."""

    def __init__(
        self,
        max_bytes: int,
        *,
        ttl: float | None = None,
        namespace: str = "embeddings",
        evicts: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._evicts = evicts
        self._ttl = ttl
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._expiry: list[tuple[float, bytes]] = []  # a heap; items of entries since replaced are skipped
        self._leases: dict[bytes, tuple[bytes, float]] = {}
        self._bytes = 0
        self.metrics = StoreMetrics("memory", namespace)

    async def get(self, key: bytes) -> memoryview | None:
        self._expire()
        entry = self._entries.get(key)
        self.metrics.lookup(entry is not None)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return memoryview(entry.value)

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        """See EmbeddingStore. False when `value` alone is over the budget (and what the key had is gone), or when there
        is no room without evicting (and what the key had stays)."""
        self._expire()
        cost = len(key) + memoryview(value).nbytes + ENTRY_OVERHEAD
        if not self._evicts and self._bytes - self._cost(key) + cost > self._max_bytes:
            self.metrics.put(False)
            return False
        self._drop(key)
        if cost > self._max_bytes:
            self.metrics.put(False)
            self._publish()
            return False
        evicted = 0
        while self._bytes + cost > self._max_bytes:
            self._drop(next(iter(self._entries)))
            evicted += 1
        self._insert(key, _frozen(value), cost, self._ttl if ttl is None else ttl)
        self.metrics.evicted(evicted)
        self.metrics.put(True)
        self._publish()
        return True

    async def contains(self, key: bytes) -> bool:
        self._expire()
        return key in self._entries

    async def delete(self, key: bytes) -> bool:
        self._drop(key)
        self._publish()
        return True

    async def discard(self, key: bytes, value: Value) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.value == bytes(value):
            await self.delete(key)

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        now = self._clock()
        held = self._leases.get(name)
        if held is not None and held[0] != owner and held[1] > now:
            return False
        self._leases[name] = (owner, now + seconds)
        return True

    async def release(self, name: bytes, owner: bytes) -> None:
        if self._leases.get(name, (b"", 0.0))[0] == owner:
            del self._leases[name]

    async def ping(self) -> bool:
        return True

    def stats(self) -> list[StoreStats]:
        return [replace(self.metrics.stats)]

    async def close(self) -> None:
        self._entries.clear()
        self._expiry.clear()
        self._leases.clear()
        self._bytes = 0
        self._publish()

    def _insert(self, key: bytes, value: bytes, cost: int, ttl: float | None) -> None:
        expires = None if ttl is None else self._clock() + ttl
        self._entries[key] = _Entry(value, cost, expires)
        self._bytes += cost
        if expires is not None:
            heapq.heappush(self._expiry, (expires, key))
            if len(self._expiry) > 2 * len(self._entries) + 64:  # mostly items of entries that are gone
                self._expiry = [(e.expires, k) for k, e in self._entries.items() if e.expires is not None]
                heapq.heapify(self._expiry)

    def _expire(self) -> None:
        now = self._clock()
        while self._expiry and self._expiry[0][0] <= now:
            expires, key = heapq.heappop(self._expiry)
            entry = self._entries.get(key)
            if entry is not None and entry.expires == expires:
                self._drop(key)
                self._publish()

    def _cost(self, key: bytes) -> int:
        entry = self._entries.get(key)
        return 0 if entry is None else entry.cost

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.cost

    def _publish(self) -> None:
        self.metrics.size(self._bytes, len(self._entries))


def _frozen(value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, memoryview) and isinstance(value.obj, bytes) and value.nbytes == len(value.obj):
        return value.obj
    return bytes(value)
