"""The embedded store: LMDB in a directory, shared by the processes of one machine. Reads copy nothing.

Everything that must agree changes in one transaction, so a process killed at any instant leaves a consistent store;
writes that wait at the same time share one (group_commit). Uses are gathered in memory and written with the next write,
or every few seconds.

Every operation runs in a small thread pool. A driver: raises StoreFailure.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import lmdb

from lookonce.core.stores.group_commit import GroupCommit
from lookonce.core.stores.interface import StoreFailure, StoreMetrics, StoreStats, Value
from lookonce.core.stores.lmdb_file import Changes, Entry, close_lmdb, cost_of, held_by_other, is_key, open_lmdb
from lookonce.core.tasks import run_in

FLUSH_SECONDS = 5.0
"""Uses are written down at least this often while the store is read."""
FLUSH_USES = 1024
"""... or when so many have gathered."""
OPERATION_TIMEOUT = 10.0
"""Seconds after which an operation counts as failed (another process stopped while it held the write lock, or a dying
disk)."""
MAX_WAITING_WRITES = 128
"""Writes queued at once; more fail at once. Each holds its value in memory."""
LOOK_FIRST_SECONDS = 1.0
"""For so long after a lease was refused, leases are looked at before the writer is asked for one: those who poll wait
for no write and take no place among those that wait. Where nobody competes, the look would be one thread hop more."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Write(Generic[T]):
    change: Callable[[Changes], T]
    value: Value | None = None
    """What it needs room for."""


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
        self._refused = -math.inf  # monotonic seconds; when a lease was last held by another
        self._closed = False
        self._file = open_lmdb(path, map_bytes=2 * max_bytes + 256 * 1024**2)
        self._env = self._file.env
        self._tables = self._file.tables
        self._readers = ThreadPoolExecutor(4, thread_name_prefix=f"store-{namespace}-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"store-{namespace}-write")
        self._queue = GroupCommit[_Write[Any]](self._writer, together=self._write, alone=self._write_alone)
        self._write([])  # publishes the totals

    async def get(self, key: bytes) -> memoryview | None:
        """See EmbeddingStore. The view pins its pages: hold it for a request, copy it to keep it."""
        value = await self._read(self._get, key)
        self.metrics.lookup(value is not None)
        if self._uses and (time.monotonic() - self._flushed > FLUSH_SECONDS or len(self._uses) > FLUSH_USES):
            self._flushed = time.monotonic()
            run_in(self._writer, self._flush)
        return value

    async def put(self, key: bytes, value: Value, *, ttl: float | None = None) -> bool:
        """See EmbeddingStore. False when `value` is over the budget, or when the disk or the map has no room for it."""
        insert = partial(self._insert, key=key, value=value, ttl=self._ttl if ttl is None else ttl)
        kept = is_key(key) and cost_of(value) <= self._max_bytes and await self._change(_Write(insert, value))
        self.metrics.put(kept)
        return kept

    async def contains(self, key: bytes) -> bool:
        return await self._read(self._contains, key)

    async def delete(self, key: bytes) -> bool:
        await self._change(_Write(lambda changes: changes.remove(key)))
        return True

    async def discard(self, key: bytes, value: Value) -> None:
        await self._change(_Write(lambda changes: changes.discard(key, value)))

    async def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        look_first = time.monotonic() - self._refused < LOOK_FIRST_SECONDS
        if look_first and await self._read(self._held_by_other, name, owner):
            taken = False
        else:
            taken = await self._change(_Write(lambda changes: changes.acquire(name, owner, seconds)))
        if not taken:
            self._refused = time.monotonic()
        return taken

    async def release(self, name: bytes, owner: bytes) -> None:
        await self._change(_Write(lambda changes: changes.release(name, owner)))

    async def ping(self) -> bool:
        await self._read(self._contains, b"ping")
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
        run_in(self._writer, self._flush)
        self._writer.shutdown()
        self._readers.shutdown()
        close_lmdb(self._file)

    async def _read(self, operation: Callable[..., T], *arguments: Any) -> T:
        run = asyncio.get_running_loop().run_in_executor
        return await self._answer(partial(run, self._readers, operation, *arguments))

    async def _change(self, write: _Write[T]) -> T:
        if self._queue.waiting >= MAX_WAITING_WRITES:
            raise StoreFailure("too many writes are waiting")
        size = 0 if write.value is None else memoryview(write.value).nbytes
        return await self._answer(partial(self._queue.submit, write, size))

    async def _answer(self, start: Callable[[], Awaitable[T]]) -> T:
        if self._closed:
            raise StoreFailure("the store is closed")
        try:
            async with asyncio.timeout(self._timeout):
                return await start()
        except Exception as error:
            raise StoreFailure("embedded store operation failed") from error

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
        if not is_key(key):
            return False
        with self._env.begin() as transaction:
            raw = transaction.get(key, db=self._tables[b"entries"])
        return raw is not None and Entry.unpack(raw).expires > self._now()

    def _held_by_other(self, name: bytes, owner: bytes) -> bool:
        with self._env.begin() as transaction:
            return held_by_other(transaction.get(name, db=self._tables[b"leases"]), owner, self._now())

    # writing, in the writer thread

    def _write(self, writes: list[_Write[Any]]) -> list[Any]:
        """All of `writes` in one transaction, with the uses gathered so far and what has expired; their results."""
        with self._uses_lock:
            uses, self._uses = self._uses, {}  # gone if this fails: it may fail by them
        self._flushed = time.monotonic()
        with self._file.writing, self._env.begin(write=True) as transaction:
            changes = Changes(transaction, self._tables, self._now)
            for key, used in uses.items():
                changes.use(key, used)
            changes.expire()
            results = [write.change(changes) for write in writes]
            changes.finish()
        self.metrics.size(changes.bytes, changes.entries)
        self.metrics.evicted(changes.evicted)
        return results

    def _write_alone(self, write: _Write[Any]) -> Any:
        try:
            return self._write([write])[0]
        except lmdb.MapFullError:  # pages pinned by old readers or lost to fragments: make more room, once
            if write.value is None:
                raise
            return self._evicts and self._write_with_more_room(write, cost_of(write.value))

    def _write_with_more_room(self, write: _Write[Any], cost: int) -> bool:
        self._env.reader_check()
        room = self._max_bytes - max(cost, self._max_bytes // 8)
        try:
            self._write([_Write(lambda changes: changes.evict(room))])
            self._write([write])
        except lmdb.MapFullError:
            return False
        return True

    def _insert(self, changes: Changes, key: bytes, value: Value, ttl: float | None) -> bool:
        if not self._evicts and changes.bytes_without(key) + cost_of(value) > self._max_bytes:
            return False
        changes.insert(key, value, ttl, self._max_bytes)
        return True

    def _flush(self) -> None:
        try:
            self._env.reader_check()  # frees the slots of readers that were killed
            self._write([])
        except (lmdb.Error, OSError):
            self.metrics.error()
