"""What the embedded store's file means, and the changes that may be made to it.

Tables: values key -> value; entries key -> (cost, used, expires); recency (used, key) and expiry (expires, key), both
in time order; totals "bytes", "entries"; leases name -> (expires, owner). Times are ns since the epoch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lmdb

from lookonce.core.stores.interface import MAX_LEASE_SECONDS, Value

PAGE_BYTES = 4096
MAX_KEY_BYTES = 255
NEVER = 2**63 - 1

_ENTRY = struct.Struct(">QQQ")  # cost in bytes, used and expires (NEVER: no expiry)
_TIME = struct.Struct(">Q")
_TOTAL = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a value. Raises struct.error when it is not whole."""

    cost: int
    used: int
    expires: int

    @staticmethod
    def unpack(raw: bytes | memoryview) -> Entry:
        return Entry(*_ENTRY.unpack(raw))

    def pack(self) -> bytes:
        return _ENTRY.pack(self.cost, self.used, self.expires)


def is_key(key: bytes) -> bool:
    """Whether LMDB takes the key in every table."""
    return 0 < len(key) <= MAX_KEY_BYTES


def cost_of(value: Value) -> int:
    """Bytes on disk, near enough: whole pages for the value, a page's share for the bookkeeping."""
    pages = -(-(memoryview(value).nbytes + 16) // PAGE_BYTES)
    return pages * PAGE_BYTES + 512


def held_by_other(lease: bytes | None, owner: bytes, now: int) -> bool:
    """Whether another owner holds this lease."""
    if lease is None or len(lease) < _TIME.size or lease[8:] == owner:  # shorter: no lease of ours
        return False
    expires: int = _TIME.unpack(lease[:8])[0]
    return 0 < expires - now <= int(MAX_LEASE_SECONDS * 1e9)


class Changes:
    """One write transaction. What keeps count is read at its start; `finish` writes it down at its end."""

    def __init__(self, transaction: lmdb.Transaction[bytes], tables: dict[bytes, Any], now: Callable[[], int]) -> None:
        self._transaction = transaction
        self._tables = tables
        self._now = now
        self._before = self._total(b"bytes"), self._total(b"entries")
        self.bytes, self.entries = self._before
        self.evicted = 0

    def finish(self) -> None:
        """Write the totals down, if they are others than before."""
        if (self.bytes, self.entries) != self._before:
            self._transaction.put(b"bytes", _TOTAL.pack(self.bytes), db=self._tables[b"totals"])
            self._transaction.put(b"entries", _TOTAL.pack(self.entries), db=self._tables[b"totals"])

    def insert(self, key: bytes, value: Value, ttl: float | None, room: int) -> None:
        """Keep `value`, evicting down to `room` bytes in all."""
        self.remove(key)
        cost, now = cost_of(value), self._now()
        self.evict(room - cost)
        entry = Entry(cost, now, NEVER if ttl is None else now + int(ttl * 1e9))
        self._transaction.put(key, value, db=self._tables[b"values"])
        self._transaction.put(key, entry.pack(), db=self._tables[b"entries"])
        self._transaction.put(_TIME.pack(entry.used) + key, b"", db=self._tables[b"recency"])
        if entry.expires != NEVER:
            self._transaction.put(_TIME.pack(entry.expires) + key, b"", db=self._tables[b"expiry"])
        self.bytes += cost
        self.entries += 1

    def bytes_without(self, key: bytes) -> int:
        """The total, were `key` removed."""
        entry = self._entry(key)
        return self.bytes - (0 if entry is None else entry.cost)

    def remove(self, key: bytes) -> None:
        """Remove the value of `key`, if there is one."""
        entry = self._entry(key)
        if entry is None:
            return
        self._transaction.delete(key, db=self._tables[b"values"])
        self._transaction.delete(key, db=self._tables[b"entries"])
        self._transaction.delete(_TIME.pack(entry.used) + key, db=self._tables[b"recency"])
        self._transaction.delete(_TIME.pack(entry.expires) + key, db=self._tables[b"expiry"])
        self.bytes -= entry.cost
        self.entries -= 1

    def discard(self, key: bytes, value: Value) -> None:
        """Remove the value of `key`, if it is this one."""
        if is_key(key) and self._transaction.get(key, db=self._tables[b"values"]) == bytes(value):
            self.remove(key)

    def evict(self, room: int) -> None:
        """Remove the least recently used until no more than `room` bytes are left."""
        while self.bytes > room and (key := self._first(b"recency", until=NEVER)) is not None:
            self.remove(key)
            self.evicted += 1

    def expire(self) -> None:
        """Remove what has had its time."""
        now = self._now()
        while (key := self._first(b"expiry", until=now)) is not None:
            self.remove(key)

    def use(self, key: bytes, used: int) -> None:
        """Note a use, unless a later one is known."""
        entry = self._entry(key)
        if entry is None or entry.used >= used:
            return
        self._transaction.delete(_TIME.pack(entry.used) + key, db=self._tables[b"recency"])
        self._transaction.put(_TIME.pack(used) + key, b"", db=self._tables[b"recency"])
        self._transaction.put(key, replace(entry, used=used).pack(), db=self._tables[b"entries"])

    def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        """Take or renew a lease, unless another owner holds it."""
        leases = self._tables[b"leases"]
        if held_by_other(self._transaction.get(name, db=leases), owner, self._now()):
            return False
        self._transaction.put(name, _TIME.pack(self._now() + int(seconds * 1e9)) + owner, db=leases)
        return True

    def release(self, name: bytes, owner: bytes) -> None:
        """Give a lease back, if `owner` has it."""
        lease = self._transaction.get(name, db=self._tables[b"leases"])
        if lease is not None and lease[8:] == owner:
            self._transaction.delete(name, db=self._tables[b"leases"])

    def _entry(self, key: bytes) -> Entry | None:
        raw = self._transaction.get(key, db=self._tables[b"entries"]) if is_key(key) else None
        return None if raw is None else Entry.unpack(raw)

    def _first(self, table: bytes, until: int) -> bytes | None:
        """The key with the earliest time in `table`, if that is not after `until`."""
        with self._transaction.cursor(db=self._tables[table]) as cursor:
            if not cursor.first():
                return None
            stamped: bytes = cursor.key()
        return stamped[8:] if _TIME.unpack(stamped[:8])[0] <= until else None

    def _total(self, name: bytes) -> int:
        raw = self._transaction.get(name, db=self._tables[b"totals"])
        return _TOTAL.unpack(raw)[0] if raw else 0
