"""What a run knows so far, in SQLite: outcomes by picture, rows of parts that are not complete yet, how many parts are.

A picture's outcome stands once, by digest; rows lead to it. So a picture is judged once whatever the order, and killing
the process at any instant loses only what was not committed. Blocking: `run.Run` keeps it to one thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.moderation.batch.outcome import Failure, Outcome, Row, Timings

_VERSION = 1
_NEVER = 1 << 62
_SCHEMA = """
CREATE TABLE pictures (
  digest BLOB PRIMARY KEY, first INTEGER NOT NULL, source TEXT NOT NULL, outcome BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (
  number INTEGER PRIMARY KEY, source TEXT NOT NULL, digest BLOB, kind TEXT, message TEXT, timings BLOB NOT NULL);
CREATE TABLE progress (parts INTEGER NOT NULL, total INTEGER);
INSERT INTO progress VALUES (0, NULL);
"""
_KEEP_FIRST = """
INSERT INTO pictures VALUES (?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET
  source = CASE WHEN excluded.first < first THEN excluded.source ELSE source END, first = min(first, excluded.first)
"""
_PRAGMAS = ("trusted_schema=OFF", "journal_mode=WAL", "synchronous=NORMAL")
Full = tuple[Row, Outcome | None, int | None, str | None]
"""A row, the outcome of its picture, and index and name of the first input with the same bytes."""


class Ledger:
    """One file, used by one process at a time."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Read-only, it is there already; another process may be using it, and what is read is of one moment."""
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
        """Let go of the file."""
        self._db.close()

    @property
    def parts(self) -> int:
        """Parts that are written."""
        return int(self._db.execute("SELECT parts FROM progress").fetchone()[0])

    @property
    def total(self) -> int | None:
        """Inputs of the source, once its end has been seen."""
        found = self._db.execute("SELECT total FROM progress").fetchone()[0]
        return None if found is None else int(found)

    def finish_listing(self, total: int) -> None:
        """The source has been read to its end."""
        self._db.execute("UPDATE progress SET total = ?", (total,))

    def row_numbers(self) -> list[int]:
        """Rows kept for parts that are not written yet."""
        return [number for (number,) in self._db.execute("SELECT number FROM rows ORDER BY number")]

    def outcome(self, digest: bytes) -> tuple[Outcome, bool] | None:
        """What is known of a picture, and whether there is a row of it."""
        found = self._db.execute("SELECT outcome, first FROM pictures WHERE digest = ?", (digest,)).fetchone()
        return (Outcome.from_json(found[0]), found[1] < _NEVER) if found is not None else None

    def record(self, rows: Iterable[Row], outcomes: dict[bytes, Outcome]) -> None:
        """Keep rows, all or none. `outcomes` holds those that are new; the others are known already."""
        with self._db:
            self._db.execute("BEGIN")
            for row in rows:
                kind, message = (row.failure.kind, row.failure.message) if row.failure else (None, None)
                self._db.execute(
                    "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?)",
                    (row.index, _text(row.source), row.digest, kind, message, row.timings.to_json()),
                )
                if row.digest is not None:
                    self._note_first(row, outcomes.get(row.digest))

    def _note_first(self, row: Row, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._db.execute(_KEEP_FIRST, (row.digest, row.index, _text(row.source), outcome.to_json()))
        else:
            self._db.execute(
                "UPDATE pictures SET first = ?1, source = ?2 WHERE digest = ?3 AND first > ?1",
                (row.index, _text(row.source), row.digest),
            )

    def rows(self, start: int, end: int = _NEVER) -> Iterator[Full]:
        """The rows from `start` to before `end`, in order. Which is the first of its picture is certain once all of
        them and all before them have been recorded."""
        found = self._db.execute(
            "SELECT r.number, r.source, r.digest, r.kind, r.message, r.timings, p.first, p.source, p.outcome "
            "FROM rows r LEFT JOIN pictures p ON p.digest = r.digest WHERE r.number >= ? AND r.number < ? "
            "ORDER BY r.number",
            (start, end),
        )
        for values in found:
            yield _full(*values)

    def part_written(self, number: int, end: int) -> None:
        """Part `number` is durable: its rows need not be kept."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM rows WHERE number < ?", (end,))
            self._db.execute("UPDATE progress SET parts = ?", (number + 1,))

    def start_again(self, *, keep_pictures: bool) -> None:
        """Forget rows and parts; and what is known of pictures, unless the same policy and models judge again."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM rows")
            self._db.execute("UPDATE progress SET parts = 0, total = NULL")
            if keep_pictures:
                self._db.execute("UPDATE pictures SET first = ?", (_NEVER,))
            else:
                self._db.execute("DELETE FROM pictures")


def _full(
    number: int,
    source: str,
    digest: bytes | None,
    kind: str | None,
    message: str | None,
    timings: bytes,
    first: int | None,
    first_source: str | None,
    outcome: bytes | None,
) -> Full:
    failure = Failure(kind, message or "") if kind is not None else None
    row = Row(number, source, digest, failure, Timings.from_json(timings))
    if outcome is None:
        return row, None, None, None
    repeated = first is not None and first < number
    return row, Outcome.from_json(outcome), first if repeated else None, first_source if repeated else None


def _text(name: str) -> str:
    """SQLite and Parquet take no lone surrogates, which stand for bytes of file names that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _damaged(path: Path) -> LookonceError:
    return LookonceError(
        ErrorKind.CONFLICT, f"{path} is damaged or made by another version: use --restart or another --out", param="out"
    )
