"""A circuit breaker around a driver: failures become misses, and a dead store costs microseconds instead of timeouts.

After `threshold` failures in a row the circuit opens: operations answer at once without touching the store. When the
back-off is over, the next operation starts one probe in the background (itself still answered at once); success
closes the circuit, failure doubles the back-off. Pattern: M. Nygard, Release It! (2007).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import Protocol, TypeVar

import structlog

from lookonce.core.stores.interface import Store, StoreFailure, Value
from lookonce.core.stores.metrics import StoreMetrics, StoreStats
from lookonce.core.tasks import end_tasks, start_task

THRESHOLD = 3
"""Failures in a row that open the circuit."""
FIRST_BACKOFF = 1.0
"""Seconds that the circuit stays open at first."""
MAX_BACKOFF = 15.0
"""Seconds that the circuit stays open at most before the next probe."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Driver(Store, Protocol):
    """A store whose operations raise StoreFailure."""

    metrics: StoreMetrics


class CircuitBreaker:
    """`driver`, guarded: a Store that raises no StoreFailure, unless it is strict. Runs on one event loop."""

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
            self._failed(_unforeseen(error))
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


def _unforeseen(error: Exception) -> StoreFailure:
    failure = StoreFailure("unforeseen")
    failure.__cause__ = error
    return failure
