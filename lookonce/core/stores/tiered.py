"""Several stores as one: near ones first. Reads fill nearer tiers, writes and deletes reach all."""

from __future__ import annotations

from collections.abc import Sequence

from lookonce.core.stores.interface import Store, StoreStats, Value


class _Read:
    """One lookup under way that may fill nearer tiers."""

    __slots__ = ("stale",)

    def __init__(self) -> None:
        self.stale = False  # the key was deleted or rewritten since the lookup began


class TieredStore:
    """`tiers`, nearest first. Leases live in the last tier, the one that processes share."""

    def __init__(self, tiers: Sequence[Store]) -> None:
        if not tiers:
            raise ValueError("tiers must not be empty")
        self._tiers = list(tiers)
        self._reads: dict[bytes, set[_Read]] = {}

    async def get(self, key: bytes) -> memoryview | None:
        """See EmbeddingStore. A value found in a far tier is copied to the nearer ones, where it lives their TTL."""
        read = _Read()
        self._reads.setdefault(key, set()).add(read)
        try:
            for depth, tier in enumerate(self._tiers):
                value = await tier.get(key)
                if value is not None:
                    await self._fill(key, value, depth, read)
                    return value
            return None
        finally:
            reads = self._reads[key]
            reads.discard(read)
            if not reads:
                del self._reads[key]

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        """See EmbeddingStore. Far tier first, so that what this process sees, others can see. False when the last
        tier refused."""
        self._outdate(key)
        try:
            return await self._tiers[-1].put(key, value, ttl=ttl)
        finally:  # even if it failed: what nearer tiers have is outdated
            for tier in reversed(self._tiers[:-1]):
                await tier.put(key, value, ttl=ttl)

    async def contains(self, key: bytes) -> bool:
        for tier in self._tiers:
            if await tier.contains(key):
                return True
        return False

    async def delete(self, key: bytes) -> bool:
        """See EmbeddingStore. Far tier first, so that no read fills a nearer one from it afterwards."""
        self._outdate(key)
        gone = True
        for tier in reversed(self._tiers):
            gone = await tier.delete(key) and gone
        return gone

    async def discard(self, key: bytes, value: Value) -> None:
        """See Store. Far tier first, as `delete`."""
        self._outdate(key)
        for tier in reversed(self._tiers):
            await tier.discard(key, value)

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        return await self._tiers[-1].acquire(name, owner, seconds)

    async def release(self, name: bytes, owner: bytes) -> None:
        await self._tiers[-1].release(name, owner)

    async def ping(self) -> bool:
        """See Store: True when every tier answers."""
        return all([await tier.ping() for tier in self._tiers])

    def stats(self) -> list[StoreStats]:
        return [stats for tier in self._tiers for stats in tier.stats()]

    async def close(self) -> None:
        for tier in self._tiers:
            await tier.close()

    async def _fill(self, key: bytes, value: memoryview, depth: int, read: _Read) -> None:
        for tier in reversed(self._tiers[:depth]):
            if read.stale:
                return
            await tier.put(key, value)
            if read.stale:  # deleted while it was being written
                await tier.delete(key)

    def _outdate(self, key: bytes) -> None:
        for read in self._reads.get(key, ()):
            read.stale = True
