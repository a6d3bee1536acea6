"""Stores around a store: one seals its values, one records its accesses as steps of the request's trace."""

from __future__ import annotations

import asyncio

import structlog

from lookonce.core.seal import Sealer
from lookonce.core.stores.interface import Store, Value
from lookonce.core.stores.metrics import StoreStats, corrupt_counter
from lookonce.core.telemetry import tracing

INLINE_BYTES = 256 * 1024
"""Values up to this size are sealed on the event loop (some 50 microseconds); larger ones in a thread."""
log = structlog.get_logger(__name__)


class StoreWrapper:
    """`store`; whoever inherits says what differs. For the verbs see Store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, key: bytes) -> memoryview | None:
        return await self._store.get(key)

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        return await self._store.put(key, value, ttl=ttl)

    async def contains(self, key: bytes) -> bool:
        return await self._store.contains(key)

    async def delete(self, key: bytes) -> bool:
        return await self._store.delete(key)

    async def discard(self, key: bytes, value: Value) -> None:
        await self._store.discard(key, value)

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        return await self._store.acquire(name, owner, seconds)

    async def release(self, name: bytes, owner: bytes) -> None:
        await self._store.release(name, owner)

    async def ping(self) -> bool:
        return await self._store.ping()

    def stats(self) -> list[StoreStats]:
        return self._store.stats()

    async def close(self) -> None:
        await self._store.close()


class SealedStore(StoreWrapper):
    """`store`, for values of one namespace; `secret` as in `Sealer`. What lies under another key than it was put, or is
    damaged, is a miss: dropped and counted. `contains` does not look at the value."""

    def __init__(self, store: Store, namespace: str, secret: str = "") -> None:
        super().__init__(store)
        self._namespace = namespace
        self._sealer = Sealer(namespace, secret)
        self._corrupt = corrupt_counter("sealed", namespace)

    async def get(self, key: bytes) -> memoryview | None:
        sealed = await self._store.get(key)
        if sealed is None:
            return None
        inline = sealed.nbytes <= INLINE_BYTES
        value = self._sealer.open(key, sealed) if inline else await asyncio.to_thread(self._sealer.open, key, sealed)
        if value is None:
            await self._drop(key, sealed)
        return value

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        return await self._store.put(key, await self._seal(key, value), ttl=ttl)

    async def discard(self, key: bytes, value: Value) -> None:
        await self._drop(key, await self._seal(key, value))

    async def _seal(self, key: bytes, value: Value) -> bytes:
        if memoryview(value).nbytes <= INLINE_BYTES:
            return self._sealer.seal(key, value)
        return await asyncio.to_thread(self._sealer.seal, key, value)

    async def _drop(self, key: bytes, sealed: Value) -> None:
        log.warning("a stored value that is not its key's was dropped", namespace=self._namespace, key=key.hex())
        self._corrupt.inc()
        await self._store.discard(key, sealed)


class TracedStore(StoreWrapper):
    """`store`, each access to a value recorded under `kind` ("redis", "file")."""

    def __init__(self, store: Store, kind: str, namespace: str) -> None:
        super().__init__(store)
        self._kind, self._namespace = kind, namespace

    async def get(self, key: bytes) -> memoryview | None:
        with tracing.step("store.get", "client") as step:
            value = await self._store.get(key)
            self._note(step, hit=value is not None, bytes=0 if value is None else value.nbytes)
        return value

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        with tracing.step("store.put", "client") as step:
            kept = await self._store.put(key, value, ttl=ttl)
            self._note(step, kept=kept, bytes=memoryview(value).nbytes)
        return kept

    async def delete(self, key: bytes) -> bool:
        with tracing.step("store.delete", "client") as step:
            gone = await self._store.delete(key)
            self._note(step, gone=gone)
        return gone

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        with tracing.step("store.acquire", "client") as step:
            held = await self._store.acquire(name, owner, seconds)
            self._note(step, held=held)
        return held

    def _note(self, step: tracing.Step, **attributes: tracing.Value) -> None:
        step.note(store=self._kind, namespace=self._namespace, **attributes)
