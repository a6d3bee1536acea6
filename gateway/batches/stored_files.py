"""Files of tenants: what batches read and write. A client's filename is only ever shown, never a path or a key."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import BinaryIO, Literal

import orjson
import structlog

from gateway.batches.database import CORRUPT, Database, Page, intact, open_row, page
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import Sealer
from lookonce.core.units import format_size

CHUNK = 256 * 1024
"""Bytes of a stored chunk: what is in memory at once."""
Purpose = Literal["batch", "batch_output"]
_SEALER = Sealer("batch-files")
_FILES = Sealer("batch-file-rows")
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """A file without its content."""

    seq: int
    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int  # Unix seconds
    expires_at: int | None

    def to_openai(self) -> dict[str, object]:
        """OpenAI's file object."""
        fields = asdict(self)
        del fields["seq"]
        return fields | {"object": "file", "status": "processed", "status_details": None}


class Files:
    """The files of all tenants. Every method takes the tenant; another's file is not there."""

    def __init__(self, database: Database, *, quota: int) -> None:
        self._database = database
        self._quota = quota  # bytes of one tenant

    async def add(self, tenant: str, filename: str, content: BinaryIO, *, lifetime: float) -> StoredFile:
        """Keep a batch's input for `lifetime` seconds. Raises INVALID_ARGUMENT when the tenant has too much."""

        def work(connection: sqlite3.Connection) -> StoredFile:
            now = int(time.time())
            _sweep(connection, now)
            stored = insert(connection, tenant, filename, "batch", _read(content), now, now + int(lifetime))
            used = connection.execute("SELECT sum(bytes) FROM files WHERE tenant = ?", (tenant,)).fetchone()[0]
            if used > self._quota:
                text = f"all files together would have {format_size(used)}, the limit is {format_size(self._quota)}"
                raise invalid(text + ": delete some first", param="file")
            return stored

        return await self._database.run(work)

    async def get(self, tenant: str, identifier: str) -> StoredFile:
        """Raises NOT_FOUND."""
        return await self._database.run(lambda connection: find(connection, tenant, identifier, time.time()))

    async def page(
        self, tenant: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> Page[StoredFile]:
        """A page. Raises INVALID_ARGUMENT for an unknown `after`."""
        where = "tenant = ? AND (expires_at IS NULL OR expires_at > ?)"
        values: tuple[object, ...] = (tenant, time.time())
        if purpose is not None:
            where, values = where + " AND purpose = ?", (*values, purpose)

        def work(connection: sqlite3.Connection) -> Page[StoredFile]:
            rows = page(connection, "files", where, values, after=after, limit=limit, newest_first=newest_first)
            return rows.map(lambda some: intact(connection, "files", some, _stored))

        return await self._database.run(work)

    async def content(self, stored: StoredFile) -> AsyncGenerator[bytes, None]:
        """The file's bytes, chunk by chunk. Raises NOT_FOUND when it is deleted meanwhile or damaged."""
        number, left = 0, stored.bytes
        while left:
            wanted = (stored.seq, number)
            row = await self._database.run(
                lambda connection, wanted=wanted: connection.execute(  # type: ignore[misc]
                    "SELECT data FROM pieces WHERE file = ? AND number = ?", wanted
                ).fetchone()
            )
            if row is None:
                raise not_found()
            data = _open_piece(stored.id, number, row["data"])
            yield data
            number, left = number + 1, left - len(data)

    async def delete(self, tenant: str, identifier: str) -> None:
        """Overwrite and remove it. Raises NOT_FOUND."""

        def work(connection: sqlite3.Connection) -> None:
            stored = find(connection, tenant, identifier, time.time())
            connection.execute("DELETE FROM files WHERE seq = ?", (stored.seq,))

        await self._database.run(work)

    async def sweep(self) -> None:
        """Remove expired files."""
        await self._database.run(lambda connection: _sweep(connection, time.time()))


def insert(
    connection: sqlite3.Connection,
    tenant: str,
    filename: str,
    purpose: Purpose,
    chunks: Iterable[bytes],
    now: int,
    expires_at: int | None,
) -> StoredFile:
    """A new file, within a transaction."""
    identifier = "file-" + secrets.token_hex(16)
    seq = connection.execute(
        "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at) VALUES (?,?,?,?,0,?,?)",
        (identifier, tenant, filename, purpose, now, expires_at),
    ).lastrowid
    size = 0
    for number, data in enumerate(chunks):
        sealed = _SEALER.seal(_piece_key(identifier, number), data)
        connection.execute("INSERT INTO pieces VALUES (?,?,?)", (seq, number, sealed))
        size += len(data)
    stored = StoredFile(seq or 0, identifier, filename, purpose, size, now, expires_at)
    seal = _FILES.seal(_file_key(tenant, stored), b"")
    connection.execute("UPDATE files SET bytes = ?, seal = ? WHERE seq = ?", (size, seal, seq))
    return stored


def find(connection: sqlite3.Connection, tenant: str, identifier: str, now: float) -> StoredFile:
    """The file, within a transaction. Raises NOT_FOUND."""
    row = connection.execute(
        "SELECT * FROM files WHERE id = ? AND tenant = ? AND (expires_at IS NULL OR expires_at > ?)",
        (identifier, tenant, now),
    ).fetchone()
    stored = _stored(row) if row is not None else None
    if stored is None:
        raise not_found()
    return stored


def split_lines(connection: sqlite3.Connection, stored: StoredFile) -> Iterator[bytes]:
    """The lines of a file without their line feeds, within a transaction. Raises NOT_FOUND when it is damaged."""
    begun: list[bytes] = []  # chunks of a line whose end has not come yet
    rows = connection.execute("SELECT data FROM pieces WHERE file = ? ORDER BY number", (stored.seq,))
    left = stored.bytes
    for number, row in enumerate(rows):
        data = _open_piece(stored.id, number, row["data"])
        left -= len(data)
        first, *others = data.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if left:
        log.error("a stored file is damaged", file=stored.id, missing=left)
        CORRUPT.inc()
        raise not_found()
    if any(begun):
        yield b"".join(begun)


def _piece_key(identifier: str, number: int) -> bytes:
    return f"{identifier}/{number}".encode()


def _open_piece(identifier: str, number: int, sealed: bytes) -> bytes:
    data = _SEALER.open(_piece_key(identifier, number), sealed)
    if data is None:
        log.error("a stored file is damaged", file=identifier, piece=number)
        CORRUPT.inc()
        raise not_found()
    return bytes(data)


def not_found() -> LookonceError:
    """No such file, or not this tenant's."""
    return LookonceError(ErrorKind.NOT_FOUND, "no such file", param="file_id")


def _stored(row: sqlite3.Row) -> StoredFile | None:
    """None for a row that is not as it was written."""
    names = ("seq", "id", "filename", "purpose", "bytes", "created_at", "expires_at")
    stored = StoredFile(**{name: row[name] for name in names})
    if open_row(_FILES, row, "seal", lambda: _file_key(row["tenant"], stored)) is None:
        return None
    return stored


def _file_key(tenant: str, stored: StoredFile) -> bytes:
    fields = asdict(stored)
    del fields["seq"]
    return orjson.dumps([tenant, fields])


def _read(content: BinaryIO) -> Iterator[bytes]:
    while data := content.read(CHUNK):
        yield data


def _sweep(connection: sqlite3.Connection, now: float) -> None:
    connection.execute("DELETE FROM files WHERE expires_at <= ?", (now,))
