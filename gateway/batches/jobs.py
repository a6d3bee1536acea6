"""Batches and their lines in the database. Every step of a batch is one transaction, so that a crash between any two
leaves it where it can go on: a line's answer and its mark are written together, the output files and the end too.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson
import structlog

from gateway.batches import files
from gateway.batches.database import CORRUPT, Database
from gateway.batches.lines import BOM, DEFAULT_LIMITS, Line, Problem, Reply, parse, refused, tokens, unanswered, written
from gateway.batches.paging import Page, page
from gateway.json_text import JsonLimits, parse_json
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.seal import Sealer

Status = Literal["validating", "in_progress", "cancelling", "completed", "failed", "expired", "cancelled"]
ACTIVE = ("validating", "in_progress", "cancelling")
End = Literal["completed", "expired", "cancelled"]
MAX_PROBLEMS = 100
"""Errors of one file that are told."""
_SEALER = Sealer("batch-lines")
log = structlog.get_logger(__name__)
_LEFT_OVER = {
    "completed": ("internal_error", "the request was not answered"),
    "expired": ("batch_expired", "the request was not answered before the batch expired"),
    "cancelled": ("batch_cancelled", "the request was not answered before the batch was cancelled"),
}


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
        counts = {"total": self.counts.total, "completed": self.counts.completed, "failed": self.counts.failed}
        return {"id": self.id, "object": "batch", "status": self.status, **shown, "request_counts": counts}


class Jobs:
    """The batches of all tenants."""

    def __init__(
        self,
        database: Database,
        *,
        max_active: int,
        limits: JsonLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._limits = limits  # of each line
        self._max_active = max_active  # of one tenant
        self._clock = clock

    async def create(
        self,
        tenant: str,
        *,
        endpoint: str,
        input_file: str,
        metadata: dict[str, str] | None,
        lifetime: float,
        output_lifetime: float,
    ) -> Job:
        """A batch in status validating; what is undone after `lifetime` seconds expires, its output files after
        `output_lifetime`. Raises NOT_FOUND for the file, RATE_LIMITED with too many batches under way."""

        def work(connection: sqlite3.Connection) -> Job:
            now = int(self._clock())
            files.find(connection, tenant, input_file, now)
            active = connection.execute(
                "SELECT count(*) FROM batches WHERE tenant = ? AND status IN (?,?,?)", (tenant, *ACTIVE)
            ).fetchone()[0]
            if active >= self._max_active:
                text = f"{active} batches are under way, the limit is {self._max_active}"
                raise LookonceError(ErrorKind.RATE_LIMITED, text, retry_after=60.0)
            document = _new_document(now, endpoint, input_file, metadata, lifetime, output_lifetime)
            identifier = "batch_" + secrets.token_hex(16)
            seq = connection.execute(
                "INSERT INTO batches (id, tenant, status, document) VALUES (?,?,'validating',?)",
                (identifier, tenant, orjson.dumps(document)),
            ).lastrowid
            return Job(seq or 0, identifier, tenant, "validating", document, Counts())

        return await self._database.run(work)

    async def get(self, tenant: str, identifier: str) -> Job:
        """Raises NOT_FOUND."""
        return await self._database.run(lambda connection: _find(connection, tenant, identifier))

    async def page(self, tenant: str, *, after: str | None, limit: int) -> Page[Job]:
        """A page, newest first. Raises INVALID_ARGUMENT for an unknown `after`."""

        def work(connection: sqlite3.Connection) -> Page[Job]:
            rows = page(connection, "batches", "tenant = ?", (tenant,), after=after, limit=limit, newest_first=True)
            return rows.map(_job)

        return await self._database.run(work)

    async def cancel(self, tenant: str, identifier: str) -> Job:
        """Mark it for cancelling. Raises NOT_FOUND, and CONFLICT when it has ended."""

        def work(connection: sqlite3.Connection) -> Job:
            job = _find(connection, tenant, identifier)
            if job.status == "cancelling":
                return job
            if job.status not in ACTIVE:
                raise LookonceError(ErrorKind.CONFLICT, f"the batch is {job.status}: it can't be cancelled")
            return _move(connection, job, "cancelling", cancelling_at=int(self._clock()))

        return await self._database.run(work)

    async def active(self) -> list[Job]:
        """All that have not ended, oldest first."""
        query = "SELECT * FROM batches WHERE status IN (?,?,?) ORDER BY seq"
        return await self._database.run(
            lambda connection: [_job(row) for row in connection.execute(query, ACTIVE).fetchall()]
        )

    async def begin(self, job: Job, check: Callable[[Line], Problem | None], *, max_lines: int) -> Job:
        """Read the input into lines: the batch is then in_progress, what is no request failed already. It failed when
        there is no request at all, or are too many, with errors that name their lines."""

        def work(connection: sqlite3.Connection) -> Job:
            now = int(self._clock())
            current = _find(connection, job.tenant, job.id)
            if current.status != "validating":
                return current
            try:
                stored = files.find(connection, job.tenant, job.document["input_file_id"], now)
                raws = files.split_lines(connection, stored)
                problems = _insert_lines(connection, job, raws, check, max_lines, self._limits)
            except LookonceError:
                return _fail(connection, job, [Problem("file_not_found", "the input file is gone or damaged")], now)
            if problems:
                return _fail(connection, job, problems, now)
            return _move(connection, job, "in_progress", in_progress_at=now)

        return await self._database.run(work)

    async def next_line(self, job: Job, after: int) -> Line | None:
        """The first pending line behind number `after`."""
        query = "SELECT * FROM lines WHERE batch = ? AND number > ? AND state = 'pending' ORDER BY number"

        def work(connection: sqlite3.Connection) -> Line | None:
            for row in connection.execute(query, (job.seq, after)):
                request = _SEALER.open(_line_key(job, row, "request"), row["request"])
                if request is not None:
                    parsed = parse_json(bytes(request), self._limits)
                    url, body = parsed.value["url"], parsed.value["body"]
                    return Line(row["number"], row["custom_id"], url, body, len(request), parsed.long)
                log.error("a line of a batch is damaged", batch=job.id, line=row["number"])
                CORRUPT.inc()
                _close_line(connection, job, row["number"], "failed", None)
            return None

        return await self._database.run(work)

    async def record(self, job: Job, line: Line, reply: Reply) -> bool:
        """Keep a line's answer, mark the line done and count its tokens, together; whether it was not done before."""
        column: Literal["completed", "failed"] = "completed" if reply.good else "failed"

        def work(connection: sqlite3.Connection) -> bool:
            place = {"number": line.number, "custom_id": line.custom_id}
            sealed = _SEALER.seal(_line_key(job, place, "result"), written(line, reply))
            done = _close_line(connection, job, line.number, column, sealed)
            if done:
                current = _find(connection, job.tenant, job.id)
                document = current.document | {"usage": _more(current.document.get("usage"), reply)}
                connection.execute("UPDATE batches SET document = ? WHERE seq = ?", (orjson.dumps(document), job.seq))
            return done

        return await self._database.run(work)

    async def finish(self, job: Job, end: End) -> Job:
        """Write the output and error files and end the batch, together."""

        def work(connection: sqlite3.Connection) -> Job:
            now = int(self._clock())
            current = _find(connection, job.tenant, job.id)
            if current.status not in ACTIVE:
                return current
            outcome: End = "cancelled" if current.status == "cancelling" else end
            outputs = _write_outputs(connection, current, outcome, now)
            connection.execute("DELETE FROM lines WHERE batch = ?", (job.seq,))
            return _move(connection, current, outcome, **{f"{outcome}_at": now}, finalizing_at=now, **outputs)

        return await self._database.run(work)


def _close_line(
    connection: sqlite3.Connection,
    job: Job,
    number: int,
    column: Literal["completed", "failed"],
    result: bytes | None,
) -> bool:
    """Mark a pending line done and count it; whether it was pending."""
    done = connection.execute(
        "UPDATE lines SET state = ?, result = ?, request = NULL WHERE batch = ? AND number = ? AND state = 'pending'",
        (column, result, job.seq, number),
    ).rowcount
    if done:
        connection.execute(f"UPDATE batches SET {column} = {column} + 1 WHERE seq = ?", (job.seq,))
    return bool(done)


def _line_key(job: Job, row: Mapping[str, Any] | sqlite3.Row, part: str) -> bytes:
    return orjson.dumps([job.id, row["number"], row["custom_id"], part])


def _new_document(
    now: int,
    endpoint: str,
    input_file: str,
    metadata: dict[str, str] | None,
    lifetime: float,
    output_lifetime: float,
) -> dict[str, Any]:
    times = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at")
    return {
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": input_file,
        "completion_window": "24h",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + max(1, int(lifetime)),
        **dict.fromkeys((*times, "cancelled_at")),
        "metadata": metadata,
        "usage": None,
        "_output_lifetime": int(output_lifetime),
    }


def _more(usage: dict[str, Any] | None, reply: Reply) -> dict[str, Any]:
    """OpenAI's usage of a batch, with one answer more."""
    prompt, cached, completion = tokens(reply)
    if usage is not None:
        prompt += usage["input_tokens"]
        cached += usage["input_tokens_details"]["cached_tokens"]
        completion += usage["output_tokens"]
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }


def _insert_lines(
    connection: sqlite3.Connection,
    job: Job,
    raws: Iterable[bytes],
    check: Callable[[Line], Problem | None],
    max_lines: int,
    limits: JsonLimits,
) -> list[Problem]:
    """Why the batch can't begin; nothing when it can."""
    problems: list[Problem] = []
    seen: set[str] = set()
    total = 0
    for number, raw in enumerate(raws, 1):
        text = raw.removeprefix(BOM)
        if not text.strip():
            continue
        if total == max_lines:
            return [Problem("too_many_requests", f"the file has more than {max_lines} requests", number)]
        total += 1
        item = _checked(parse(text, number, limits), check, seen)
        custom_id = item.custom_id or ""
        place = {"number": number, "custom_id": custom_id}
        row: tuple[int, int, str, bytes | None, str, bytes | None]
        if isinstance(item, Line):
            seen.add(custom_id)
            row = (job.seq, number, custom_id, _SEALER.seal(_line_key(job, place, "request"), text), "pending", None)
        else:
            if len(problems) < MAX_PROBLEMS:
                problems.append(item)
            result = _SEALER.seal(_line_key(job, place, "result"), refused(item))
            row = (job.seq, number, custom_id, None, "failed", result)
        insert = "INSERT INTO lines (batch, number, custom_id, request, state, result) VALUES (?,?,?,?,?,?)"
        connection.execute(insert, row)
    if not seen:
        return problems or [Problem("empty_file", "the file has no requests")]
    update = "UPDATE batches SET total = ?, failed = ? WHERE seq = ?"
    connection.execute(update, (total, total - len(seen), job.seq))
    return []


def _checked(item: Line | Problem, check: Callable[[Line], Problem | None], seen: Container[str]) -> Line | Problem:
    """The line, if it is a request of this batch and its custom_id new."""
    if isinstance(item, Problem):
        return item
    problem = check(item)
    if problem is None and item.custom_id in seen:
        text = "'custom_id' is the same as on an earlier line"
        problem = Problem("duplicate_custom_id", text, item.number, "custom_id", item.custom_id)
    return problem or item


def _fail(connection: sqlite3.Connection, job: Job, problems: list[Problem], now: int) -> Job:
    connection.execute("DELETE FROM lines WHERE batch = ?", (job.seq,))
    errors = {"object": "list", "data": [problem.to_openai() for problem in problems]}
    return _move(connection, job, "failed", failed_at=now, errors=errors)


def _write_outputs(connection: sqlite3.Connection, job: Job, end: End, now: int) -> dict[str, str | None]:
    code, message = _LEFT_OVER[end]
    expires = now + int(job.document["_output_lifetime"])

    def result(row: sqlite3.Row) -> memoryview | None:
        opened = None if row["result"] is None else _SEALER.open(_line_key(job, row, "result"), row["result"])
        if row["result"] is not None and opened is None:
            log.error("an answer of a batch is damaged", batch=job.id, line=row["number"])
            CORRUPT.inc()
        return opened

    def results(failed: bool) -> Iterator[bytes | memoryview]:
        states = ("failed", "pending") if failed else ("completed", "completed")
        query = "SELECT * FROM lines WHERE batch = ? AND state IN (?,?) ORDER BY number"
        for row in connection.execute(query, (job.seq, *states)):
            yield result(row) or unanswered(row["custom_id"], code, message)

    def write(name: str, failed: bool) -> str | None:
        filename = f"{job.id}_{name}.jsonl"
        stored = files.insert(connection, job.tenant, filename, "batch_output", _pieces(results(failed)), now, expires)
        if stored.bytes:
            return stored.id
        connection.execute("DELETE FROM files WHERE seq = ?", (stored.seq,))
        return None

    return {"output_file_id": write("output", False), "error_file_id": write("error", True)}


def _pieces(texts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    buffer = bytearray()
    for text in texts:
        buffer += text
        if len(buffer) >= files.PIECE:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def _move(connection: sqlite3.Connection, job: Job, status: Status, **changes: Any) -> Job:
    moved = replace(job, status=status, document=job.document | changes)
    connection.execute(
        "UPDATE batches SET status = ?, document = ? WHERE seq = ?", (status, orjson.dumps(moved.document), job.seq)
    )
    return _job(connection.execute("SELECT * FROM batches WHERE seq = ?", (job.seq,)).fetchone())


def _find(connection: sqlite3.Connection, tenant: str, identifier: str) -> Job:
    row = connection.execute("SELECT * FROM batches WHERE id = ? AND tenant = ?", (identifier, tenant)).fetchone()
    if row is None:
        raise LookonceError(ErrorKind.NOT_FOUND, "no such batch", param="batch_id")
    return _job(row)


def _job(row: sqlite3.Row) -> Job:
    counts = Counts(row["total"], row["completed"], row["failed"])
    return Job(row["seq"], row["id"], row["tenant"], row["status"], orjson.loads(row["document"]), counts)
