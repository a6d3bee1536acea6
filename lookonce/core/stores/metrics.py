"""Counters of one store, readable in the process and exported to Prometheus.

Prometheus collectors are made once a process; any number of stores share them, told apart by their labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter, Gauge

_LABELS: Final = ("store", "namespace")
_HITS = Counter("lookonce_store_hits", "Lookups that found their key.", _LABELS)
_MISSES = Counter("lookonce_store_misses", "Lookups that did not find their key.", _LABELS)
_PUTS = Counter("lookonce_store_puts", "Values written.", _LABELS)
_REFUSED = Counter("lookonce_store_refused", "Values that could not be kept (too large, or no room).", _LABELS)
_EVICTIONS = Counter("lookonce_store_evictions", "Values removed to stay within the byte budget.", _LABELS)
_ERRORS = Counter("lookonce_store_errors", "Operations that failed and were treated as misses.", _LABELS)
_CORRUPT = Counter("lookonce_store_corrupt", "Values dropped because they failed verification.", _LABELS)
_BYTES = Gauge("lookonce_store_bytes", "Bytes held.", _LABELS)
_ENTRIES = Gauge("lookonce_store_entries", "Values held.", _LABELS)
_DEGRADED = Gauge("lookonce_store_degraded", "1 while the circuit breaker keeps the store out of use.", _LABELS)


def corrupt_counter(store: str, namespace: str) -> Counter:
    """Counts values that failed verification, for what verifies them in front of a store."""
    return _CORRUPT.labels(store, namespace)


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
        labels = (store, namespace)
        self._hits, self._misses, self._puts = _HITS.labels(*labels), _MISSES.labels(*labels), _PUTS.labels(*labels)
        self._refused, self._evictions = _REFUSED.labels(*labels), _EVICTIONS.labels(*labels)
        self._errors, self._corrupt = _ERRORS.labels(*labels), _CORRUPT.labels(*labels)
        self._bytes, self._entries = _BYTES.labels(*labels), _ENTRIES.labels(*labels)
        self._degraded = _DEGRADED.labels(*labels)

    def lookup(self, found: bool) -> None:
        if found:
            self.stats.hits += 1
            self._hits.inc()
        else:
            self.stats.misses += 1
            self._misses.inc()

    def put(self, kept: bool) -> None:
        if kept:
            self.stats.puts += 1
            self._puts.inc()
        else:
            self.stats.refused += 1
            self._refused.inc()

    def evicted(self, count: int) -> None:
        if count:
            self.stats.evictions += count
            self._evictions.inc(count)

    def error(self) -> None:
        self.stats.errors += 1
        self._errors.inc()

    def corrupt(self) -> None:
        self.stats.corrupt += 1
        self._corrupt.inc()

    def size(self, total: int, entries: int) -> None:
        self.stats.bytes, self.stats.entries = total, entries
        self._bytes.set(total)
        self._entries.set(entries)

    def degraded(self, degraded: bool) -> None:
        self.stats.degraded = degraded
        self._degraded.set(degraded)
