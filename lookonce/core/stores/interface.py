"""The store interface: four verbs and close; and leases, held by one process at a time.

Values are opaque bytes. A store's own failure is a miss, never an error of the caller: `get` answers None, `put` False.
Drivers (Redis, embedded) raise StoreFailure; the circuit breaker that `open_store` puts around them makes it a miss.
For callers to whom "it is not there" and "it could not be looked for" are different things, a strict store raises
StoreFailure from `get`, `put` and `contains`.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, runtime_checkable

import structlog

from lookonce.core.backoff import Backoff
from lookonce.core.stores.metrics import StoreStats

Value = bytes | bytearray | memoryview
MAX_LEASE_SECONDS = 3600.0
"""A lease that claims to last longer is none: its clock has since been set back, or something else was put there."""
log = structlog.get_logger(__name__)


class StoreFailure(Exception):
    """A driver could not do what was asked (server gone, timed out, full, file damaged). The cause is chained; `code`
    is the word that the server's own error began with, such as NOPERM, if it sent one."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


@runtime_checkable
class EmbeddingStore(Protocol):
    """Keys are bytes (32 for embeddings). Every store has a byte budget, a TTL and least-recently-used eviction."""

    async def get(self, key: bytes) -> memoryview | None:
        """The value, read-only, or None. The view stays valid while it is referenced (zero-copy where possible)."""
        ...

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        """Keep `value` for `ttl` seconds (None: the store's own TTL). False when it could not be kept."""
        ...

    async def contains(self, key: bytes) -> bool:
        """Whether `get` would find the key; does not count as a use."""
        ...

    async def delete(self, key: bytes) -> bool:
        """Remove the key; True only once it is known to be gone from this store (absent counts as gone)."""
        ...

    async def close(self) -> None:
        """Release files, connections and threads. Idempotent."""
        ...


@runtime_checkable
class Leases(Protocol):
    """A lock that runs out: held by one owner across processes, lost to others when its time ends."""

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        """Take or renew the lease. True when held by `owner` now, and also when the store is out of order
        (without a working store there is nobody to coordinate with)."""
        ...

    async def release(self, name: bytes, owner: bytes) -> None:
        """Give the lease back if `owner` still holds it."""
        ...


@runtime_checkable
class Store(EmbeddingStore, Leases, Protocol):
    """What `open_store` answers: values, leases, and a look at how it fares."""

    async def discard(self, key: bytes, value: Value) -> None:
        """Remove what was found to be no good, unless the key has another value by now."""
        ...

    async def ping(self) -> bool:
        """Whether the store answers right now, asked afresh (never a circuit breaker's memory)."""
        ...

    def stats(self) -> list[StoreStats]:
        """One snapshot a tier, nearest first. `degraded` tells that a tier is out of use for now."""
        ...


@asynccontextmanager
async def leased(leases: Leases, name: bytes, *, seconds: float = 10.0) -> AsyncIterator[None]:
    """Hold the lease `name` for the body, in which something is read, changed and written back: processes don't undo
    each other's changes.

    A holder that died keeps others waiting for `seconds` at most, which the body, too, may take. After twice as long
    the body runs without the lease: what others hold for so long is no longer a short change."""
    owner, give_up, backoff = os.urandom(16), time.monotonic() + 2 * seconds, Backoff(0.005, 0.1, factor=1.5)
    while not await leases.acquire(name, owner, seconds):
        if time.monotonic() > give_up:
            log.warning("changed without its lease", seconds=2 * seconds)
            break
        await backoff.sleep()
    try:
        yield
    finally:
        await leases.release(name, owner)
