"""The store interface: four verbs and close; leases, held by one process at a time; and what every store counts.

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
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import structlog
from prometheus_client import Counter, Gauge

from lookonce.core.backoff import Backoff

Value = bytes | bytearray | memoryview
MAX_LEASE_SECONDS = 3600.0
"""A lease that claims to last longer is none: its clock has since been set back, or something else was put there."""
log = structlog.get_logger(__name__)

_LABELS: Final = ("store", "namespace")
_COUNTERS: Final = {
    name: Counter(f"lookonce_store_{name}", help_text, _LABELS)
    for name, help_text in {
        "hits": "Lookups that found their key.",
        "misses": "Lookups that did not find their key.",
        "puts": "Values written.",
        "refused": "Values that could not be kept (too large, or no room).",
        "evictions": "Values removed to stay within the byte budget.",
        "errors": "Operations that failed and were treated as misses.",
        "corrupt": "Values dropped because they failed verification.",
    }.items()
}
_BYTES = Gauge("lookonce_store_bytes", "Bytes held.", _LABELS)
_ENTRIES = Gauge("lookonce_store_entries", "Values held.", _LABELS)
_DEGRADED = Gauge("lookonce_store_degraded", "1 while the circuit breaker keeps the store out of use.", _LABELS)


def corrupt_counter(store: str, namespace: str) -> Counter:
    """Counts values that failed verification, for what verifies them in front of a store."""
    return _COUNTERS["corrupt"].labels(store, namespace)


@dataclass
class StoreStats:
    """A snapshot of one store. `bytes` and `entries` are None where only the server knows."""

    store: str  # "memory" | "embedded" | "redis" | "cache"
    namespace: str
    hits: int = 0
    misses: int = 0
    puts: int = 0
    refused: int = 0
    evictions: int = 0
    errors: int = 0
    corrupt: int = 0
    bytes: int | None = None
    entries: int | None = None
    degraded: bool = False


class StoreMetrics:
    """Counts for one store object. Threads may share it: increments are single bytecode-level adds on ints that only
    grow."""

    def __init__(self, store: str, namespace: str) -> None:
        self.stats = StoreStats(store, namespace)
        self._counters = {name: counter.labels(store, namespace) for name, counter in _COUNTERS.items()}
        self._bytes, self._entries = _BYTES.labels(store, namespace), _ENTRIES.labels(store, namespace)
        self._degraded = _DEGRADED.labels(store, namespace)

    def lookup(self, found: bool) -> None:
        self._count("hits" if found else "misses")

    def put(self, kept: bool) -> None:
        self._count("puts" if kept else "refused")

    def evicted(self, count: int) -> None:
        self._count("evictions", count)

    def error(self) -> None:
        self._count("errors")

    def corrupt(self) -> None:
        self._count("corrupt")

    def size(self, total: int, entries: int) -> None:
        self.stats.bytes, self.stats.entries = total, entries
        self._bytes.set(total)
        self._entries.set(entries)

    def degraded(self, degraded: bool) -> None:
        self.stats.degraded = degraded
        self._degraded.set(degraded)

    def _count(self, name: str, number: int = 1) -> None:
        setattr(self.stats, name, getattr(self.stats, name) + number)
        self._counters[name].inc(number)


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
