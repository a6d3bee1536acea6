"""The database of files and batches: one connection in one thread, one transaction a call, one process.

SQLite in WAL mode with full synchronisation: what was committed outlives a crash of the process and of the machine.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import structlog

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import Sealer
from lookonce.core.stores.interface import corrupt_counter

T = TypeVar("T")
U = TypeVar("U")
VERSION = 2
_SCHEMA = """
CREATE TABLE files (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, filename TEXT NOT NULL,
  purpose TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER,
  seal BLOB);
CREATE INDEX files_of_tenant ON files (tenant, seq);
CREATE TABLE pieces (
  file INTEGER NOT NULL REFERENCES files (seq) ON DELETE CASCADE, number INTEGER NOT NULL, data BLOB NOT NULL,
  PRIMARY KEY (file, number)) WITHOUT ROWID;
CREATE TABLE batches (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, status TEXT NOT NULL,
  document BLOB, total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
  failed INTEGER NOT NULL DEFAULT 0);
CREATE INDEX batches_of_tenant ON batches (tenant, seq);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE lines (
  batch INTEGER NOT NULL REFERENCES batches (seq) ON DELETE CASCADE, number INTEGER NOT NULL, custom_id TEXT NOT NULL,
  request BLOB, state TEXT NOT NULL DEFAULT 'pending', result BLOB, PRIMARY KEY (batch, number)) WITHOUT ROWID;
"""
CORRUPT = corrupt_counter("sqlite", "batches")
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some items, and whether more follow."""

    items: Sequence[T]
    more: bool

    def map(self, call: Callable[[Sequence[T]], Sequence[U]]) -> Page[U]:
        """The same page of other items."""
        return Page(call(self.items), self.more)


class Database:
    """Opened by one gateway at a time."""

    def __init__(self, directory: Path) -> None:
        """Open or create DIRECTORY/batches.sqlite3. Raises INVALID_ARGUMENT when the directory can't be used, CONFLICT
        when another gateway uses it."""
        self._lock = _claim(directory)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            self._connection = self._thread.submit(_open, directory / "batches.sqlite3").result()
        except (sqlite3.Error, LookonceError) as error:
            self._thread.shutdown()
            os.close(self._lock)
            text = f"--data-dir={directory}: batches.sqlite3 is damaged or made by another version: move it away"
            raise invalid(text, param="data_dir") from error

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` as one transaction: all of it is kept, or nothing. Raises UNAVAILABLE when the database fails."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            log.exception("the batch database failed")
            text = "files and batches can't be stored right now"
            raise LookonceError(ErrorKind.UNAVAILABLE, text, retry_after=5.0) from error
        return result

    def close(self) -> None:
        """Finish what is under way and let go of the directory."""
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
        os.close(self._lock)


def open_row(sealer: Sealer, row: sqlite3.Row, column: str, key: Callable[[], bytes]) -> memoryview | None:
    """What is sealed in a column for the fields that `key` writes down; None, and counted, when it is not theirs."""
    with suppress(TypeError):  # values of other types, which SQLite allows
        value = sealer.open(key(), row[column])
        if value is not None:
            return value
    log.error("a stored file or batch is damaged", id=row["id"])
    CORRUPT.inc()
    return None


def page(
    connection: sqlite3.Connection,
    table: Literal["files", "batches"],
    where: str,
    values: tuple[object, ...],
    *,
    after: str | None,
    limit: int,
    newest_first: bool,
) -> Page[sqlite3.Row]:
    """At most `limit` rows behind the one whose id is `after`. `where` is ours, never a client's."""
    order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
    if after is not None:
        row = connection.execute(f"SELECT seq FROM {table} WHERE id = ? AND {where}", (after, *values)).fetchone()
        if row is None:
            raise invalid("'after' must be the id of an item of this list", param="after")
        where, values = f"{where} AND seq {beyond} ?", (*values, row["seq"])
    query = f"SELECT * FROM {table} WHERE {where} ORDER BY seq {order} LIMIT ?"
    rows = connection.execute(query, (*values, limit + 1)).fetchall()
    return Page(rows[:limit], len(rows) > limit)


def intact(
    connection: sqlite3.Connection,
    table: Literal["files", "batches"],
    rows: Iterable[sqlite3.Row],
    read: Callable[[sqlite3.Row], T | None],
) -> list[T]:
    """What `read` makes of rows. A row of which it makes nothing is damaged: it is dropped, and all that is its own."""
    found = [(row["seq"], read(row)) for row in rows]
    connection.executemany(f"DELETE FROM {table} WHERE seq = ?", [(seq,) for seq, item in found if item is None])
    return [item for _, item in found if item is not None]


def _claim(directory: Path) -> int:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = f"--data-dir={directory}: cannot be used; choose a directory this user may write to"
        raise invalid(text, param="data_dir") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        text = f"--data-dir={directory}: another gateway uses it; give each gateway its own"
        raise LookonceError(ErrorKind.CONFLICT, text, param="data_dir") from error
    return descriptor


def _open(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
    elif version != VERSION:
        raise invalid("another version")
    return connection
