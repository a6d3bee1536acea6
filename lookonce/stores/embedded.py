"""The embedded store: LMDB in a directory, shared by the processes of one machine. Reads copy nothing.

Tables: values key -> value; entries key -> (cost, used, expires); recency (used, key) and expiry (expires, key), both
in time order; totals "bytes", "entries"; leases name -> (expires, owner). Everything that must agree changes in one
transaction, so a process killed at any instant leaves a consistent store. Uses are gathered in memory and written
with the next write, or every few seconds.

Every operation runs in a small thread pool. A driver: raises StoreFailure.
"""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from lookonce.stores.base import StoreFailure, Value
from lookonce.stores.lmdb_file import close_lmdb, open_lmdb
from lookonce.stores.metrics import StoreMetrics, StoreStats

PAGE_BYTES = 4096
MAX_KEY_BYTES = 255
FLUSH_SECONDS = 5.0
"""Uses are written down at least this often while the store is read."""
FLUSH_USES = 1024
"""... or when so many have gathered."""
OPERATION_TIMEOUT = 10.0
"""Seconds after which an operation counts as failed (another process stopped while it held the write lock, or a dying
disk)."""
MAX_WAITING_WRITES = 128
"""Writes queued at once; more fail at once. Each holds its value in memory."""
MAX_LEASE_SECONDS = 3600.0
"""A lease that claims to last longer comes from a clock that has since been set back, and is void."""
NEVER = 2**63 - 1

_ENTRY = struct.Struct(">QQQ")  # cost in bytes, used and expires in ns since the epoch (NEVER: no expiry)
_TIME = struct.Struct(">Q")
_TOTAL = struct.Struct(">Q")
T = TypeVar("T")


class _Full(Exception):
    """There is no room without evicting."""


@dataclass(frozen=True, slots=True)
class _Entry:
    cost: int
    used: int
    expires: int

    @staticmethod
    def unpack(raw: bytes | memoryview) -> _Entry:
        return _Entry(*_ENTRY.unpack(raw))

    def pack(self) -> bytes:
        return _ENTRY.pack(self.cost, self.used, self.expires)


class EmbeddedStore:
    """At most `max_bytes` of whole pages in directory `path`, least recently used out first; values live `ttl` seconds.
    Without `evicts` nothing goes before its time: what has no room is refused.

    The file may grow to twice the budget (pages still seen by a reader are not reused at once). Processes that share
    a store should agree on the budget: each evicts down to its own. Opens the file when made: raises
    LookonceError(INVALID_ARGUMENT) when the directory cannot be used.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        *,
        ttl: float | None = None,
        namespace: str = "embeddings",
        evicts: bool = True,
        clock: Callable[[], float] = time.time,
        operation_timeout: float = OPERATION_TIMEOUT,
    ) -> None:
        self.metrics = StoreMetrics("embedded", namespace)
        self._max_bytes = max_bytes
        self._evicts = evicts
        self._ttl = ttl
        self._clock = clock
        self._timeout = operation_timeout
        self._uses: dict[bytes, int] = {}  # key -> ns of its last use, not yet written down
        self._uses_lock = threading.Lock()
        self._flushed = time.monotonic()
        self._closed = False
        self._waiting_writes = 0
        self._file = open_lmdb(path, map_bytes=2 * max_bytes + 256 * 1024**2)
        self._env = self._file.env
        self._tables = self._file.tables
        self._readers = ThreadPoolExecutor(4, thread_name_prefix=f"store-{namespace}-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"store-{namespace}-write")
        self._write(lambda _transaction: None)  # publishes the totals

    async def get(self, key: bytes) -> memoryview | None:
        """See EmbeddingStore. The view pins its pages: hold it for a request, copy it to keep it."""
        value = await self._run(self._readers, self._get, key)
        self.metrics.lookup(value is not None)
        if self._uses and (time.monotonic() - self._flushed > FLUSH_SECONDS or len(self._uses) > FLUSH_USES):
            self._flushed = time.monotonic()
            self._writer.submit(self._flush)
        return value

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        """See EmbeddingStore. False when `value` is over the budget, or when the disk or the map has no room for it."""
        kept = await self._run(self._writer, self._put, key, value, self._ttl if ttl is None else ttl)
        self.metrics.put(kept)
        return kept

    async def contains(self, key: bytes) -> bool:
        """See EmbeddingStore."""
        return await self._run(self._readers, self._contains, key)

    async def delete(self, key: bytes) -> bool:
        """See EmbeddingStore."""
        await self._run(self._writer, self._write, lambda transaction: self._remove(transaction, key))
        return True

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        """See Leases."""
        if await self._run(self._readers, self._held_by_other, name, owner):
            return False
        return await self._run(self._writer, self._acquire, name, owner, seconds)

    async def release(self, name: bytes, owner: bytes) -> None:
        """See Leases."""
        await self._run(self._writer, self._release, name, owner)

    async def ping(self) -> bool:
        """See Store."""
        await self._run(self._readers, self._contains, b"ping")
        return True

    def stats(self) -> list[StoreStats]:
        """See Store. `bytes` and `entries` are those of this process's last write."""
        return [replace(self.metrics.stats)]

    async def close(self) -> None:
        """See EmbeddingStore. Views already given out stay valid."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        self._writer.submit(self._flush)
        self._writer.shutdown()
        self._readers.shutdown()
        close_lmdb(self._file)

    async def _run(self, pool: ThreadPoolExecutor, operation: Callable[..., T], *arguments: Any) -> T:
        if self._closed:
            raise StoreFailure("the store is closed")
        try:
            async with asyncio.timeout(self._timeout):
                if pool is self._writer:
                    return await self._run_writer(operation, *arguments)
                return await asyncio.get_running_loop().run_in_executor(pool, operation, *arguments)
        except (lmdb.Error, OSError, struct.error) as error:  # OSError includes TimeoutError
            raise StoreFailure("embedded store operation failed") from error

    async def _run_writer(self, operation: Callable[..., T], *arguments: Any) -> T:
        if self._waiting_writes >= MAX_WAITING_WRITES:
            raise StoreFailure("too many writes are waiting")
        self._waiting_writes += 1
        future = asyncio.get_running_loop().run_in_executor(self._writer, operation, *arguments)
        future.add_done_callback(self._write_done)
        return await asyncio.shield(future)

    def _write_done(self, future: asyncio.Future[Any]) -> None:
        self._waiting_writes -= 1
        if not future.cancelled():
            future.exception()  # retrieved, should nobody be waiting any more

    def _now(self) -> int:
        return int(self._clock() * 1e9)

    # reading, in a reader thread

    def _get(self, key: bytes) -> memoryview | None:
        if not self._contains(key):
            return None
        value = self._file.view(key)
        if value is not None:
            with self._uses_lock:
                self._uses[key] = self._now()
        return value

    def _contains(self, key: bytes) -> bool:
        if not 0 < len(key) <= MAX_KEY_BYTES:
            return False
        with self._env.begin() as transaction:
            raw = transaction.get(key, db=self._tables[b"entries"])
        return raw is not None and _Entry.unpack(raw).expires > self._now()

    def _held_by_other(self, name: bytes, owner: bytes) -> bool:
        with self._env.begin() as transaction:
            return self._lease_of_other(transaction.get(name, db=self._tables[b"leases"]), owner)

    def _lease_of_other(self, raw: bytes | None, owner: bytes) -> bool:
        if raw is None or raw[8:] == owner:
            return False
        expires: int = _TIME.unpack(raw[:8])[0]
        return 0 < expires - self._now() <= int(MAX_LEASE_SECONDS * 1e9)

    # writing, in the writer thread

    def _write(self, change: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        """Run `change` in a write transaction, with the uses gathered so far and what has expired."""
        with self._uses_lock:
            uses, self._uses = self._uses, {}
        self._flushed = time.monotonic()
        with self._file.writing, self._env.begin(write=True) as transaction:
            for key, used in uses.items():
                self._use(transaction, key, used)
            self._expire(transaction)
            result = change(transaction)
            totals = self._totals(transaction)
        self.metrics.size(*totals)
        return result

    def _flush(self) -> None:
        try:
            self._env.reader_check()  # frees the slots of readers that were killed
            self._write(lambda _transaction: None)
        except (lmdb.Error, OSError):
            self.metrics.error()

    def _put(self, key: bytes, value: Value, ttl: float | None) -> bool:
        if not 0 < len(key) <= MAX_KEY_BYTES or _cost(value) > self._max_bytes:
            return False
        evicted = 0
        try:
            evicted = self._write(lambda transaction: self._insert(transaction, key, value, ttl))
        except _Full:
            return False
        except lmdb.MapFullError:  # pages pinned by old readers or lost to fragments: make more room, once
            if not self._evicts:
                return False
            evicted = self._make_room(max(_cost(value), self._max_bytes // 8))
            try:
                evicted += self._write(lambda transaction: self._insert(transaction, key, value, ttl))
            except lmdb.MapFullError:
                return False
        finally:
            self.metrics.evicted(evicted)
        return True

    def _make_room(self, room: int) -> int:
        self._env.reader_check()
        return self._write(lambda transaction: self._evict(transaction, room))

    def _insert(self, transaction: lmdb.Transaction[bytes], key: bytes, value: Value, ttl: float | None) -> int:
        self._remove(transaction, key)
        evicted = self._evict(transaction, _cost(value))
        now = self._now()
        entry = _Entry(_cost(value), now, NEVER if ttl is None else now + int(ttl * 1e9))
        transaction.put(key, value, db=self._tables[b"values"])
        transaction.put(key, entry.pack(), db=self._tables[b"entries"])
        transaction.put(_TIME.pack(entry.used) + key, b"", db=self._tables[b"recency"])
        if entry.expires != NEVER:
            transaction.put(_TIME.pack(entry.expires) + key, b"", db=self._tables[b"expiry"])
        self._count(transaction, entry.cost, 1)
        return evicted

    def _remove(self, transaction: lmdb.Transaction[bytes], key: bytes) -> None:
        raw = transaction.get(key, db=self._tables[b"entries"]) if 0 < len(key) <= MAX_KEY_BYTES else None
        if raw is None:
            return
        entry = _Entry.unpack(raw)
        transaction.delete(key, db=self._tables[b"values"])
        transaction.delete(key, db=self._tables[b"entries"])
        transaction.delete(_TIME.pack(entry.used) + key, db=self._tables[b"recency"])
        transaction.delete(_TIME.pack(entry.expires) + key, db=self._tables[b"expiry"])
        self._count(transaction, -entry.cost, -1)

    def _evict(self, transaction: lmdb.Transaction[bytes], room: int) -> int:
        """Remove the least recently used until `room` more bytes fit. Answers how many went."""
        evicted = 0
        while self._totals(transaction)[0] + room > self._max_bytes:
            key = self._first(transaction, b"recency", until=NEVER)
            if key is None:
                break
            if not self._evicts:
                raise _Full  # the transaction is undone
            self._remove(transaction, key)
            evicted += 1
        return evicted

    def _expire(self, transaction: lmdb.Transaction[bytes]) -> None:
        now = self._now()
        while (key := self._first(transaction, b"expiry", until=now)) is not None:
            self._remove(transaction, key)

    def _first(self, transaction: lmdb.Transaction[bytes], table: bytes, until: int) -> bytes | None:
        with transaction.cursor(db=self._tables[table]) as cursor:
            if not cursor.first():
                return None
            stamped = cursor.key()
        return stamped[8:] if _TIME.unpack(stamped[:8])[0] <= until else None

    def _use(self, transaction: lmdb.Transaction[bytes], key: bytes, used: int) -> None:
        raw = transaction.get(key, db=self._tables[b"entries"])
        if raw is None or (entry := _Entry.unpack(raw)).used >= used:
            return
        transaction.delete(_TIME.pack(entry.used) + key, db=self._tables[b"recency"])
        transaction.put(_TIME.pack(used) + key, b"", db=self._tables[b"recency"])
        transaction.put(key, replace(entry, used=used).pack(), db=self._tables[b"entries"])

    def _totals(self, transaction: lmdb.Transaction[bytes]) -> tuple[int, int]:
        raw = transaction.get(b"bytes", db=self._tables[b"totals"])
        entries = transaction.get(b"entries", db=self._tables[b"totals"])
        return (_TOTAL.unpack(raw)[0] if raw else 0, _TOTAL.unpack(entries)[0] if entries else 0)

    def _count(self, transaction: lmdb.Transaction[bytes], cost: int, entries: int) -> None:
        total, count = self._totals(transaction)
        transaction.put(b"bytes", _TOTAL.pack(total + cost), db=self._tables[b"totals"])
        transaction.put(b"entries", _TOTAL.pack(count + entries), db=self._tables[b"totals"])

    def _acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        def take(transaction: lmdb.Transaction[bytes]) -> bool:
            leases = self._tables[b"leases"]
            if self._lease_of_other(transaction.get(name, db=leases), owner):
                return False
            transaction.put(name, _TIME.pack(self._now() + int(seconds * 1e9)) + owner, db=leases)
            return True

        return self._write(take)

    def _release(self, name: bytes, owner: bytes) -> None:
        def give_back(transaction: lmdb.Transaction[bytes]) -> None:
            raw = transaction.get(name, db=self._tables[b"leases"])
            if raw is not None and raw[8:] == owner:
                transaction.delete(name, db=self._tables[b"leases"])

        self._write(give_back)


def _cost(value: Value) -> int:
    """Bytes on disk, near enough: whole pages for the value, a page's share for the bookkeeping."""
    pages = -(-(memoryview(value).nbytes + 16) // PAGE_BYTES)
    return pages * PAGE_BYTES + 512
