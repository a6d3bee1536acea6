"""A store whose accesses are steps of the request's trace."""

from __future__ import annotations

from lookonce.core.stores.interface import Store, Value
from lookonce.core.stores.metrics import StoreStats
from lookonce.core.telemetry import tracing


class TracedStore:
    """`store`, each access to a value recorded under `kind` ("redis", "file")."""

    def __init__(self, store: Store, kind: str, namespace: str) -> None:
        self._store = store
        self._kind, self._namespace = kind, namespace

    async def get(self, key: bytes) -> memoryview | None:
        """See EmbeddingStore."""
        with tracing.step("store.get", "client") as step:
            value = await self._store.get(key)
            self._note(step, hit=value is not None, bytes=0 if value is None else value.nbytes)
        return value

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        """See EmbeddingStore."""
        with tracing.step("store.put", "client") as step:
            kept = await self._store.put(key, value, ttl=ttl)
            self._note(step, kept=kept, bytes=memoryview(value).nbytes)
        return kept

    async def contains(self, key: bytes) -> bool:
        """See EmbeddingStore."""
        return await self._store.contains(key)

    async def delete(self, key: bytes) -> bool:
        """See EmbeddingStore."""
        with tracing.step("store.delete", "client") as step:
            gone = await self._store.delete(key)
            self._note(step, gone=gone)
        return gone

    async def discard(self, key: bytes, value: Value) -> None:
        """See Store."""
        await self._store.discard(key, value)

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        """See Leases."""
        with tracing.step("store.acquire", "client") as step:
            held = await self._store.acquire(name, owner, seconds)
            self._note(step, held=held)
        return held

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

    def _note(self, step: tracing.Step, **attributes: tracing.Value) -> None:
        step.note(store=self._kind, namespace=self._namespace, **attributes)
