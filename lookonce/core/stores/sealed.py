"""A store whose values are sealed: what lies under another key than it was put, or is damaged, is a miss."""

from __future__ import annotations

import asyncio

import structlog

from lookonce.core.seal import Sealer
from lookonce.core.stores.interface import Store, Value
from lookonce.core.stores.metrics import StoreStats, corrupt_counter

INLINE_BYTES = 256 * 1024
"""Values up to this size are sealed on the event loop (some 50 microseconds); larger ones in a thread."""
log = structlog.get_logger(__name__)


class SealedStore:
    """`store`, for values of one namespace; `secret` as in `Sealer`. A value that fails is dropped and counted."""

    def __init__(self, store: Store, namespace: str, secret: str = "") -> None:
        self._store = store
        self._namespace = namespace
        self._sealer = Sealer(namespace, secret)
        self._corrupt = corrupt_counter("sealed", namespace)

    async def get(self, key: bytes) -> memoryview | None:
        """See EmbeddingStore."""
        sealed = await self._store.get(key)
        if sealed is None:
            return None
        inline = sealed.nbytes <= INLINE_BYTES
        value = self._sealer.open(key, sealed) if inline else await asyncio.to_thread(self._sealer.open, key, sealed)
        if value is None:
            await self._drop(key, sealed)
        return value

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        """See EmbeddingStore."""
        return await self._store.put(key, await self._seal(key, value), ttl=ttl)

    async def contains(self, key: bytes) -> bool:
        """See EmbeddingStore. The value is not looked at."""
        return await self._store.contains(key)

    async def delete(self, key: bytes) -> bool:
        """See EmbeddingStore."""
        return await self._store.delete(key)

    async def discard(self, key: bytes, value: Value) -> None:
        """See Store."""
        await self._drop(key, await self._seal(key, value))

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        """See Leases."""
        return await self._store.acquire(name, owner, seconds)

    async def release(self, name: bytes, owner: bytes) -> None:
        """See Leases."""
        await self._store.release(name, owner)

    async def ping(self) -> bool:
        """See Store."""
        return await self._store.ping()

    def stats(self) -> list[StoreStats]:
        """See Store."""
        return self._store.stats()

    async def close(self) -> None:
        """See EmbeddingStore."""
        await self._store.close()

    async def _seal(self, key: bytes, value: Value) -> bytes:
        if memoryview(value).nbytes <= INLINE_BYTES:
            return self._sealer.seal(key, value)
        return await asyncio.to_thread(self._sealer.seal, key, value)

    async def _drop(self, key: bytes, sealed: Value) -> None:
        log.warning("a stored value that is not its key's was dropped", namespace=self._namespace, key=key.hex())
        self._corrupt.inc()
        await self._store.discard(key, sealed)
