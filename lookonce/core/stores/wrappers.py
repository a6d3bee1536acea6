"""Stores around a store: a circuit breaker, a seal on values, and steps of the request's trace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import Protocol, TypeVar

import structlog

from lookonce.core.identity import Sealer
from lookonce.core.stores.interface import Store, StoreFailure, StoreMetrics, StoreStats, Value, corrupt_counter
from lookonce.core.tasks import end_tasks, start_task
from lookonce.core.telemetry import tracing

INLINE_BYTES = 256 * 1024
"""Values up to this size are sealed on the event loop (some 50 microseconds); larger ones in a thread."""
THRESHOLD = 3
"""Failures in a row that open the circuit."""
FIRST_BACKOFF = 1.0
"""Seconds that the circuit stays open at first."""
MAX_BACKOFF = 15.0
"""Seconds that the circuit stays open at most before the next probe."""
T = TypeVar("T")
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


class Driver(Store, Protocol):
    """A store whose operations raise StoreFailure."""

    metrics: StoreMetrics


class CircuitBreaker:
    """`driver`, guarded: failures become misses, and a dead store costs microseconds instead of timeouts.

    After `threshold` failures in a row the circuit opens: operations answer at once without touching the store. When
    the back-off is over, the next operation starts one probe in the background (itself still answered at once); success
    closes the circuit, failure doubles the back-off. Pattern: M. Nygard, Release It! (2007). Raises StoreFailure only
    where it is strict. Runs on one event loop.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        threshold: int = THRESHOLD,
        first_backoff: float = FIRST_BACKOFF,
        max_backoff: float = MAX_BACKOFF,
        strict: bool = False,
    ) -> None:
        """`strict`: see `open_store`."""
        self._driver = driver
        self._strict = strict
        self._threshold = threshold
        self._first_backoff = first_backoff
        self._max_backoff = max_backoff
        self._failures = 0  # in a row
        self._backoff = first_backoff  # seconds
        self._probe_at: float | None = None  # monotonic seconds; None: closed
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the store is out of use for now."""
        return self._probe_at is not None

    async def get(self, key: bytes) -> memoryview | None:
        if self._blocked():
            self._driver.metrics.lookup(False)
            return self._untold(None)
        return await self._guard(self._driver.get(key), None, tell=True)

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        if self._blocked():
            return self._untold(False)
        return await self._guard(self._driver.put(key, value, ttl=ttl), False, tell=True)

    async def contains(self, key: bytes) -> bool:
        if self._blocked():
            return self._untold(False)
        return await self._guard(self._driver.contains(key), False, tell=True)

    async def delete(self, key: bytes) -> bool:
        """See EmbeddingStore. Tried even while the circuit is open: erasure must not be skipped to save time."""
        return await self._guard(self._driver.delete(key), False)

    async def discard(self, key: bytes, value: Value) -> None:
        if not self._blocked():
            await self._guard(self._driver.discard(key, value), None)

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        return True if self._blocked() else await self._guard(self._driver.acquire(name, owner, seconds), True)

    async def release(self, name: bytes, owner: bytes) -> None:
        if not self._blocked():
            await self._guard(self._driver.release(name, owner), None)

    async def ping(self) -> bool:
        return await self._guard(self._driver.ping(), False)

    def stats(self) -> list[StoreStats]:
        return [replace(stats, degraded=self.is_open) for stats in self._driver.stats()]

    async def close(self) -> None:
        if self._probe is not None:
            await end_tasks(self._probe)
            self._probe = None
        await self._driver.close()

    async def _guard(self, operation: Awaitable[T], otherwise: T, *, tell: bool = False) -> T:
        try:
            result = await operation
        except StoreFailure as failure:
            self._failed(failure)
            return self._untold(otherwise, failure) if tell else otherwise
        self._succeeded()
        return result

    def _untold(self, otherwise: T, failure: StoreFailure | None = None) -> T:
        """What is answered when the store did not tell. Raises StoreFailure where the breaker is strict."""
        if self._strict:
            raise failure or StoreFailure("the store is out of use")
        return otherwise

    def _blocked(self) -> bool:
        if self._probe_at is None:
            return False
        if self._probe is None and time.monotonic() >= self._probe_at:
            self._probe = start_task(self._try_again(), awaited=False)
        return True

    async def _try_again(self) -> None:
        try:
            await self.ping()
        except Exception as error:  # a driver that broke its promise: known by its traceback, and still out of use
            log.exception("probe of a store failed unforeseen", store=self._driver.metrics.stats.store)
            failure = StoreFailure("unforeseen")
            failure.__cause__ = error
            self._failed(failure)
        finally:
            self._probe = None

    def _succeeded(self) -> None:
        if self._probe_at is not None:
            log.info("store in use again", store=self._driver.metrics.stats.store)
            self._driver.metrics.degraded(False)
        self._failures, self._backoff, self._probe_at = 0, self._first_backoff, None

    def _failed(self, failure: StoreFailure) -> None:
        self._failures += 1
        self._driver.metrics.error()
        stats = self._driver.metrics.stats
        cause = type(failure.__cause__).__name__ if failure.__cause__ else str(failure)
        cause = f"{cause}: {failure.code}" if failure.code else cause
        if self._probe_at is None and self._failures < self._threshold:
            log.warning("store operation failed", store=stats.store, namespace=stats.namespace, cause=cause)
            return
        now = time.monotonic()
        if self._probe_at is None:
            log.warning("store out of use", store=stats.store, namespace=stats.namespace, cause=cause)
            self._driver.metrics.degraded(True)
            self._probe_at = now + self._backoff
        elif now >= self._probe_at:  # the probe failed, not a straggler from before
            self._backoff = min(2 * self._backoff, self._max_backoff)
            self._probe_at = now + self._backoff
