"""One batch, and its row in the database: sealed, all of it with its id."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict, dataclass
from typing import Any, Literal

import orjson

from gateway.batches.database import open_row
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import Sealer

Status = Literal["validating", "in_progress", "cancelling", "completed", "failed", "expired", "cancelled"]
_SEALER = Sealer("batch-rows")


@dataclass(frozen=True)
class Counts:
    """How far a batch is, in lines."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Job:
    """One batch. `document` holds the rest of OpenAI's batch object; times are Unix seconds."""

    seq: int
    id: str
    tenant: str
    status: Status
    document: dict[str, Any]
    counts: Counts

    @property
    def endpoint(self) -> str:
        """Which route all lines are for."""
        return str(self.document["endpoint"])

    @property
    def expires_at(self) -> float:
        """When what is left undone is given up."""
        return float(self.document["expires_at"])

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        shown = {name: value for name, value in self.document.items() if not name.startswith("_")}
        return {"id": self.id, "object": "batch", "status": self.status, **shown, "request_counts": asdict(self.counts)}


def write(connection: sqlite3.Connection, job: Job) -> Job:
    """Keep the batch as it is now, within a transaction."""
    sealed = _SEALER.seal(_key(job.id, job.tenant, job.status, job.counts), orjson.dumps(job.document))
    connection.execute(
        "UPDATE batches SET status = ?, document = ?, total = ?, completed = ?, failed = ? WHERE seq = ?",
        (job.status, sealed, job.counts.total, job.counts.completed, job.counts.failed, job.seq),
    )
    return job


def _key(*fields: object) -> bytes:
    return orjson.dumps(fields)


def find(connection: sqlite3.Connection, tenant: str, identifier: str) -> Job:
    """The batch, within a transaction. Raises NOT_FOUND."""
    row = connection.execute("SELECT * FROM batches WHERE id = ? AND tenant = ?", (identifier, tenant)).fetchone()
    job = read(row) if row is not None else None
    if job is None:
        raise LookonceError(ErrorKind.NOT_FOUND, "no such batch", param="batch_id")
    return job


def read(row: sqlite3.Row) -> Job | None:
    """None for a row that is not as it was written."""
    counts = Counts(row["total"], row["completed"], row["failed"])
    fields = (row["id"], row["tenant"], row["status"])
    document = open_row(_SEALER, row, "document", lambda: _key(*fields, counts))
    return Job(row["seq"], *fields, orjson.loads(document), counts) if document is not None else None
