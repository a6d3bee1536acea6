"""The image store: three stores, so that what is to last is not evicted by what comes and goes, and a spare in memory
for what they could not take."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.stores import Store, StoreFailure
from lookonce.core.stores.interface import StoreStats, Value

PINNED_SECONDS = 100 * 365 * 86400.0
"""How long a pinned image is kept: longer than any store stands."""
LASTING_SECONDS = 90 * 365 * 86400.0
"""What is put into the store for so long is not to be evicted."""
FILE_KEY = b"file:"
"""How the keys of image files begin."""


class StoreOutage(LookonceError):
    """The image store could not do what was asked: what it was asked for may well be there."""

    def __init__(self) -> None:
        super().__init__(ErrorKind.UNAVAILABLE, "the image store cannot be reached", retry_after=1.0)


class StoreWithSpare:
    """The image store, and the gateway's own memory for what it could not take."""

    def __init__(self, store: Store, spare: Store) -> None:
        self.store, self.spare = store, spare

    async def put(self, key: bytes, value: Value, *, ttl: float) -> bool:
        """Keep a value; whether the store has it, or only this process."""
        try:
            kept = await self.store.put(key, value, ttl=ttl)
        except StoreOutage:
            kept = False
        if kept:
            await self.spare.delete(key)
        else:
            await self.spare.put(key, value, ttl=ttl)
        return kept

    async def delete(self, key: bytes) -> bool:
        """Delete a value; whether that is confirmed."""
        return all([await self.store.delete(key), await self.spare.delete(key)])

    async def close(self) -> None:
        """See Store."""
        await self.store.close()
        await self.spare.close()


class ImageStores:
    """A `Store` of three strict ones: files and records of images, least recently used out first; files of pinned
    images, which a full store refuses instead; and what tells of images that last (records of pinned ones, lists,
    names). A value that is put for LASTING_SECONDS or more lasts until it is deleted.

    `get`, `put` and `contains` raise StoreOutage when a store could not do it."""

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
        return all([await store.ping() for store in self._all])

    def stats(self) -> list[StoreStats]:
        """See Store."""
        return [stats for store in self._all for stats in store.stats()]

    async def close(self) -> None:
        """See EmbeddingStore."""
        for store in self._all:
            await store.close()

    def _lasting(self, key: bytes) -> Store:
        return self._pinned if key.startswith(FILE_KEY) else self._index


@contextmanager
def _outages() -> Iterator[None]:
    try:
        yield
    except StoreFailure as failure:
        raise StoreOutage from failure
