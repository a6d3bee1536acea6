"""Pages of a tenant's rows, in the order they were made."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from lookonce.core.errors import invalid

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some items, and whether more follow."""

    items: Sequence[T]
    more: bool

    def map(self, call: Callable[[Sequence[T]], Sequence[U]]) -> Page[U]:
        """The same page of other items."""
        return Page(call(self.items), self.more)


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
