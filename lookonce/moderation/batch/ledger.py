"""What a run knows so far, in SQLite: outcomes by image, rows of parts that are not complete yet, digests of parts.

An image's outcome stands once, by digest; rows lead to it. So an image is judged once whatever the order, and killing
the process at any instant loses only what was not committed. Every value is sealed: an outcome for its image and the
judgement (policy and models), the rest for its number or image and the run. Blocking: `run.Run` keeps it to one
thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import orjson
import structlog

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import Sealer
from lookonce.moderation.batch.outcome import Outcome, Row, text
from lookonce.moderation.batch.run_identity import Identity

_VERSION = 3
_SCHEMA = """
CREATE TABLE images (digest BLOB PRIMARY KEY, outcome BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE firsts (digest BLOB PRIMARY KEY, input BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (number INTEGER PRIMARY KEY, row BLOB NOT NULL);
CREATE TABLE parts (number INTEGER PRIMARY KEY, digest BLOB NOT NULL);
"""
_PRAGMAS = ("trusted_schema=OFF", "journal_mode=WAL", "synchronous=NORMAL")
_ALL = 1 << 62
log = structlog.get_logger(__name__)
Full = tuple[Row, Outcome | None, int | None, str | None]
"""A row, the outcome of its image, and index and name of the first input with the same bytes."""
Table = Literal["images", "firsts", "rows", "parts"]
_KEYS: dict[Table, str] = {"images": "digest", "firsts": "digest", "rows": "number", "parts": "number"}
_VALUES: dict[Table, str] = {"images": "outcome", "firsts": "input", "rows": "row", "parts": "digest"}


class Ledger:
    """One file, used by one process at a time."""

    def __init__(self, path: Path, identity: Identity, *, read_only: bool = False) -> None:
        """Read-only, it is there already; another process may be using it, and what is read is of one moment. Raises
        CONFLICT for a file that is no ledger."""
        run = identity.run_key()
        self._path = path
        self._sealers: dict[Table, Sealer] = {
            table: Sealer(f"moderate-{table}/{identity.judgement_key() if table == 'images' else run}")
            for table in _KEYS
        }
        try:
            mode = "ro" if read_only else "rwc"
            self._db = sqlite3.connect(
                f"file:{quote(str(path))}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
            )
            for pragma in ("trusted_schema=OFF",) if read_only else _PRAGMAS:
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            if read_only:
                self._db.execute("BEGIN")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not read_only:
                self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={_VERSION}; COMMIT;")
        except sqlite3.Error as error:
            raise _damaged(path) from error
        if version not in (0, _VERSION) or (version == 0 and read_only):
            raise _damaged(path)

    def close(self) -> None:
        self._db.close()

    def mend(self, intact: Callable[[int, bytes], bool], images_of: Callable[[int], Iterable[bytes]]) -> int:
        """Drop what fails its seal, and all that hangs on it, so that it is made again; how much failed. `intact`:
        whether a part is there with that digest; `images_of`: the digests of its images."""
        try:
            with self._db:
                self._db.execute("BEGIN")
                dropped = sum(self._drop_damaged(table) for table in _KEYS)
                whole = self._whole_parts(intact)
                dropped += len(self._keys("parts")) - whole
                if dropped:
                    known = (all(map(self._known, images_of(number))) for number in range(whole))
                    whole = next((number for number, good in enumerate(known) if not good), whole)
                    rows = zip(self._keys("rows"), self.rows(0), strict=True)
                    self._delete("rows", [number for number, full in rows if full is None])
                self._db.execute("DELETE FROM parts WHERE number >= ?", (whole,))
        except sqlite3.Error as error:
            raise _damaged(self._path) from error
        return dropped

    def _drop_damaged(self, table: Table) -> int:
        found = self._db.execute(f"SELECT {_KEYS[table]}, {_VALUES[table]} FROM {table}")
        bad = [key for key, sealed in found if self._open(table, key, sealed) is None]
        if bad:
            log.warning("entries of the ledger that are damaged or another's were dropped", table=table, count=len(bad))
        return self._delete(table, bad)

    def _delete(self, table: Table, keys: list[Any]) -> int:
        self._db.executemany(f"DELETE FROM {table} WHERE {_KEYS[table]} = ?", ((key,) for key in keys))
        return len(keys)

    def _whole_parts(self, intact: Callable[[int, bytes], bool]) -> int:
        """How many parts there are before the first that is missing or another."""
        parts = self.parts()
        for number in range(len(parts)):
            digest = parts.get(number)
            if digest is None or not intact(number, digest):
                log.warning("a part that is damaged or another's was dropped", part=number)
                return number
        return len(parts)

    def _known(self, digest: bytes) -> bool:
        return self._get("images", digest) is not None and self._get("firsts", digest) is not None

    def _keys(self, table: Table) -> list[Any]:
        key = _KEYS[table]
        return [found for (found,) in self._db.execute(f"SELECT {key} FROM {table} ORDER BY {key}")]

    def _get(self, table: Table, key: bytes | int) -> bytes | None:
        """The value; None when there is none, or another's."""
        query = f"SELECT {_VALUES[table]} FROM {table} WHERE {_KEYS[table]} = ?"
        found = self._db.execute(query, (key,)).fetchone()
        return self._open(table, key, found[0]) if found is not None else None

    def _put(self, table: Table, key: bytes | int, value: bytes) -> None:
        self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (key, self._seal(table, key, value)))

    def _seal(self, table: Table, key: bytes | int, value: bytes) -> bytes:
        return self._sealers[table].seal(_key(key), value)

    def _open(self, table: Table, key: Any, sealed: Any) -> bytes | None:
        """Also None for keys and values of other types, which SQLite allows."""
        value = None
        if isinstance(sealed, bytes) and isinstance(key, bytes | int):
            value = self._sealers[table].open(_key(key), sealed)
        return None if value is None else bytes(value)

    def parts(self) -> dict[int, bytes | None]:
        """The digests of the parts that are written; None for one that is damaged."""
        return {number: self._get("parts", number) for number in self._keys("parts")}

    def row_numbers(self) -> list[int]:
        """Rows kept for parts that are not written yet."""
        return self._keys("rows")

    def outcome(self, digest: bytes, index: int) -> tuple[Outcome, bool] | None:
        """What is known of an image, and whether there is a row of it besides the one at `index`."""
        found = self._get("images", digest)
        if found is None:
            return None
        first = self._get("firsts", digest)
        return Outcome.from_json(found), first is not None and orjson.loads(first)[0] != index

    def record(self, rows: Iterable[Row], outcomes: dict[bytes, Outcome]) -> None:
        """Keep rows, all or none. `outcomes` holds those that are new; the others are known already."""
        with self._db:
            self._db.execute("BEGIN")
            for row in rows:
                self._put("rows", row.index, row.to_json())
                if row.digest is not None:
                    outcome = outcomes.get(row.digest)
                    if outcome is not None and self._get("images", row.digest) is None:
                        self._put("images", row.digest, outcome.to_json())
                    self._note_first(row.digest, row)

    def _note_first(self, digest: bytes, row: Row) -> None:
        known = self._get("firsts", digest)
        if known is None or row.index < orjson.loads(known)[0]:
            self._put("firsts", digest, orjson.dumps([row.index, text(row.source)]))

    def rows(self, start: int, end: int = _ALL) -> Iterator[Full | None]:
        """The rows from `start` to before `end`, in order; None for one that is damaged, or whose image is. Which is
        the first of its image is certain once all of them and all before them have been recorded."""
        query = "SELECT number, row FROM rows WHERE number >= ? AND number < ? ORDER BY number"
        found = self._db.execute(query, (start, end))
        for number, sealed in found:
            opened = self._open("rows", number, sealed)
            yield self._full(Row.from_json(number, opened)) if opened is not None else None

    def _full(self, row: Row) -> Full | None:
        if row.digest is None:
            return row, None, None, None
        outcome, first = self._get("images", row.digest), self._get("firsts", row.digest)
        if outcome is None or first is None:
            return None
        index, source = orjson.loads(first)
        repeated = index < row.index
        return row, Outcome.from_json(outcome), index if repeated else None, source if repeated else None

    def part_written(self, number: int, end: int, digest: bytes) -> None:
        """Part `number` is durable: its rows need not be kept."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM rows WHERE number < ?", (end,))
            self._put("parts", number, digest)

    def start_again(self, *, keep_images: bool) -> None:
        """Forget rows and parts; and what is known of images, unless the same policy and models judge again."""
        with self._db:
            self._db.execute("BEGIN")
            for table in _KEYS:
                if table != "images" or not keep_images:
                    self._db.execute(f"DELETE FROM {table}")


def _key(key: bytes | int) -> bytes:
    return key if isinstance(key, bytes) else str(key).encode()


def _damaged(path: Path) -> LookonceError:
    return LookonceError(
        ErrorKind.CONFLICT, f"{path} is damaged or made by another version: use --restart or another --out", param="out"
    )
