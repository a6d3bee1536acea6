"""The embedded store's file, an LMDB environment: opening it safely, lending views into it, and the changes to be made.

Several processes may have it open, and any may be killed at any instant. `opening.lock` is held exclusively while a
process opens the file, `users.lock` shared for as long as it uses it. Who finds no other user may inspect the file,
and when it is damaged or not LMDB's, moves it aside (`damaged/`) and starts empty: this is a cache, so a service starts
rather than dies.

Tables: values key -> value; entries key -> (cost, used, expires); recency (used, key) and expiry (expires, key), both
in time order; totals "bytes", "entries"; leases name -> (expires, owner). Times are ns since the epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import structlog
from lmdb.verify import VerifyError, verify

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.stores.interface import MAX_LEASE_SECONDS, Value

MAX_READERS = 4096
"""Views and lookups that may be under way at once, over all processes."""
OPEN_TIMEOUT = 30.0
"""Seconds to wait for another process that is opening the same store."""
TABLES = (b"values", b"entries", b"recency", b"expiry", b"totals", b"leases")
log = structlog.get_logger(__name__)
_open_files: dict[Path, LmdbFile] = {}
_registry_lock = threading.Lock()
PAGE_BYTES = 4096
MAX_KEY_BYTES = 255
NEVER = 2**63 - 1

_ENTRY = struct.Struct(">QQQ")  # cost in bytes, used and expires (NEVER: no expiry)
_NUMBER = struct.Struct(">Q")  # a time or a total


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
    if lease is None or len(lease) < _NUMBER.size or lease[8:] == owner:  # shorter: no lease of ours
        return False
    expires: int = _NUMBER.unpack(lease[:8])[0]
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
            self._transaction.put(b"bytes", _NUMBER.pack(self.bytes), db=self._tables[b"totals"])
            self._transaction.put(b"entries", _NUMBER.pack(self.entries), db=self._tables[b"totals"])

    def insert(self, key: bytes, value: Value, ttl: float | None, room: int) -> None:
        """Keep `value`, evicting down to `room` bytes in all."""
        self.remove(key)
        cost, now = cost_of(value), self._now()
        self.evict(room - cost)
        entry = Entry(cost, now, NEVER if ttl is None else now + int(ttl * 1e9))
        self._transaction.put(key, value, db=self._tables[b"values"])
        self._transaction.put(key, entry.pack(), db=self._tables[b"entries"])
        self._transaction.put(_NUMBER.pack(entry.used) + key, b"", db=self._tables[b"recency"])
        if entry.expires != NEVER:
            self._transaction.put(_NUMBER.pack(entry.expires) + key, b"", db=self._tables[b"expiry"])
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
        self._transaction.delete(_NUMBER.pack(entry.used) + key, db=self._tables[b"recency"])
        self._transaction.delete(_NUMBER.pack(entry.expires) + key, db=self._tables[b"expiry"])
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
        self._transaction.delete(_NUMBER.pack(entry.used) + key, db=self._tables[b"recency"])
        self._transaction.put(_NUMBER.pack(used) + key, b"", db=self._tables[b"recency"])
        self._transaction.put(key, replace(entry, used=used).pack(), db=self._tables[b"entries"])

    def acquire(self, name: bytes, owner: bytes, seconds: float) -> bool:
        """Take or renew a lease, unless another owner holds it."""
        leases = self._tables[b"leases"]
        if held_by_other(self._transaction.get(name, db=leases), owner, self._now()):
            return False
        self._transaction.put(name, _NUMBER.pack(self._now() + int(seconds * 1e9)) + owner, db=leases)
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
        return stamped[8:] if _NUMBER.unpack(stamped[:8])[0] <= until else None

    def _total(self, name: bytes) -> int:
        raw = self._transaction.get(name, db=self._tables[b"totals"])
        return _NUMBER.unpack(raw)[0] if raw else 0


class LmdbFile:
    """An open environment and its tables. Obtain with `open_lmdb`, give back with `close`; views outlive both."""

    def __init__(self, path: Path, map_bytes: int) -> None:
        self.path = path
        self.users = 1
        self.writing = threading.Lock()  # one writer thread at a time, so that LMDB's lock is only waited for by one
        self._lock = threading.RLock()  # reentrant: a view's finalizer may run in the thread that holds it
        self._views = 0
        self._closing = False
        self._users_fd, self.env = _open_alone_or_shared(path, map_bytes)
        self.tables: dict[bytes, Any] = {name: self.env.open_db(name) for name in TABLES}

    def view(self, key: bytes) -> memoryview | None:
        """The value of `key` without copying. Its read transaction ends when the last reference to the view goes."""
        transaction = self.env.begin(buffers=True)
        try:
            value = transaction.get(key, db=self.tables[b"values"])
        except BaseException:
            transaction.abort()
            raise
        if value is None:
            transaction.abort()
            return None
        array = np.frombuffer(value, dtype=np.uint8)
        with self._lock:
            self._views += 1
        weakref.finalize(array, self._return_view, transaction).atexit = False
        return array.data.toreadonly()

    def share(self) -> bool:
        """Count one more user. False when the environment has just been closed."""
        with self._lock:
            if self._users_fd < 0:
                return False
            self.users += 1
            self._closing = False
            return True

    def release(self) -> None:
        """Close the environment, now or when the last view into it goes (unmapping under a view would be fatal)."""
        with self._lock:
            self._closing = True
            self._close_if_unused()

    def _return_view(self, transaction: lmdb.Transaction[memoryview]) -> None:
        transaction.abort()
        with self._lock:
            self._views -= 1
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closing and self._views == 0 and self._users_fd >= 0:
            self.env.close()
            os.close(self._users_fd)
            self._users_fd = -1
            if _open_files.get(self.path) is self:
                del _open_files[self.path]


def open_lmdb(path: Path, map_bytes: int) -> LmdbFile:
    """Open (or create) the environment in directory `path`, or share the one this process has open already.

    Raises LookonceError(INVALID_ARGUMENT) when the directory cannot be used.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        path = path.resolve()
        with _registry_lock:
            shared = _open_files.get(path)
            if shared is not None and shared.share():
                return shared
            opened = LmdbFile(path, map_bytes)
            _open_files[path] = opened
            return opened
    except (OSError, lmdb.Error) as error:
        log.error("embedded store cannot be opened", path=str(path), cause=repr(error))
        raise LookonceError(
            ErrorKind.INVALID_ARGUMENT,
            f"store: directory {path} cannot be used ({type(error).__name__}); it must be writable and on a local disk",
            param="store",
        ) from error


def close_lmdb(file: LmdbFile) -> None:
    """Give back what `open_lmdb` answered."""
    with _registry_lock:
        file.users -= 1
        if file.users == 0:
            file.release()


def _open_alone_or_shared(path: Path, map_bytes: int) -> tuple[int, lmdb.Environment]:
    with _exclusive(path / "opening.lock"):
        users_fd = os.open(path / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(users_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                env = _open_alone(path, map_bytes)
            except BlockingIOError:
                env = _open(path, map_bytes=0)  # 0: the size that the first user chose
            fcntl.flock(users_fd, fcntl.LOCK_SH)
        except BaseException:
            os.close(users_fd)
            raise
        return users_fd, env


def _open_alone(path: Path, map_bytes: int) -> lmdb.Environment:
    if not _is_whole(path):
        _move_aside(path)
    with contextlib.suppress(FileNotFoundError):
        (path / "lock.mdb").unlink()  # nobody uses it: readers and lock owners in it are dead
    try:
        env = _open(path, map_bytes)
        with env.begin(write=True) as transaction:  # records the size of the map for later openers
            transaction.put(b"format", b"lookonce 1")
        return env
    except lmdb.Error as error:
        log.warning("embedded store could not be read", path=str(path), cause=repr(error))
        _move_aside(path)
        return _open(path, map_bytes)


def _open(path: Path, map_bytes: int) -> lmdb.Environment:
    return lmdb.open(
        os.fspath(path),
        map_size=map_bytes,
        mode=0o600,
        max_dbs=len(TABLES),
        max_readers=MAX_READERS,
        max_spare_txns=16,
        metasync=False,  # a power cut may lose the last commit, never the file's integrity
    )


def _is_whole(path: Path) -> bool:
    data = path / "data.mdb"
    if not data.exists():
        return True
    try:
        findings: list[Any] = verify(os.fspath(data), subdir=False)  # type: ignore[no-untyped-call]
    except (VerifyError, OSError, ValueError) as error:
        findings = [error]
    if findings:
        log.warning("embedded store is damaged", path=str(path), finding=str(findings[0])[:200], findings=len(findings))
    return not findings


def _move_aside(path: Path) -> None:
    aside = path / "damaged"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o700)
    for name in ("data.mdb", "lock.mdb"):
        with contextlib.suppress(FileNotFoundError):
            (path / name).rename(aside / name)
    log.warning("embedded store starts empty, the old file was moved aside", path=str(aside))


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        give_up = time.monotonic() + OPEN_TIMEOUT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    raise TimeoutError("another process has been opening the store for too long") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)
