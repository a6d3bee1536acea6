"""The image store in three rooms, so that what is to last is not evicted by what comes and goes: files and records of
images, least recently used out first; files of pinned images, where a full room refuses instead; and what tells of
images that last (records of pinned ones, lists, names)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.images.image_records import FILE_KEY, LASTING_SECONDS, StoreOutage
from lookonce.core.stores import Store, StoreFailure
from lookonce.core.stores.interface import Value
from lookonce.core.stores.metrics import StoreStats


class ImageStores:
    """A `Store` of three strict ones. A value that is put for LASTING_SECONDS or more lasts until it is deleted.

    `get`, `put` and `contains` raise StoreOutage when a room could not do it."""

    def __init__(self, passing: Store, pinned: Store, index: Store) -> None:
        self._passing, self._pinned, self._index = passing, pinned, index
        self._all = (passing, pinned, index)

    async def get(self, key: bytes) -> memoryview | None:
        """See EmbeddingStore."""
        with _outages():
            value = await self._passing.get(key)
            return await self._lasting(key).get(key) if value is None else value

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        """See EmbeddingStore. False when there is no room: what lasts evicts nothing."""
        lasting = self._lasting(key)
        with _outages():
            if ttl is not None and ttl >= LASTING_SECONDS:
                kept, other = await lasting.put(key, value), self._passing
            else:
                kept, other = await self._passing.put(key, value, ttl=ttl), lasting
            if kept and await other.contains(key) and not await other.delete(key):
                raise StoreFailure("an older value stays beside the new one")
        return kept

    async def contains(self, key: bytes) -> bool:
        """See EmbeddingStore."""
        with _outages():
            return await self._passing.contains(key) or await self._lasting(key).contains(key)

    async def delete(self, key: bytes) -> bool:
        """See EmbeddingStore."""
        return all(await asyncio.gather(self._passing.delete(key), self._lasting(key).delete(key)))

    async def discard(self, key: bytes, value: Value) -> None:
        """See Store."""
        await asyncio.gather(self._passing.discard(key, value), self._lasting(key).discard(key, value))

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        """See Leases."""
        return await self._index.acquire(name, owner, seconds)

    async def release(self, name: bytes, owner: bytes) -> None:
        """See Leases."""
        await self._index.release(name, owner)

    async def ping(self) -> bool:
        """See Store."""
        return all([await room.ping() for room in self._all])

    def stats(self) -> list[StoreStats]:
        """See Store."""
        return [stats for room in self._all for stats in room.stats()]

    async def close(self) -> None:
        """See EmbeddingStore."""
        for room in self._all:
            await room.close()

    def _lasting(self, key: bytes) -> Store:
        return self._pinned if key.startswith(FILE_KEY) else self._index


@contextmanager
def _outages() -> Iterator[None]:
    try:
        yield
    except StoreFailure as failure:
        raise StoreOutage from failure
