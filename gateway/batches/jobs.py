"""Batches and their lines in the database. Every step of a batch is one transaction, so that a crash between any two
leaves it where it can go on: a line's answer and its mark are written together, the output files and the end too.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import orjson
import structlog

from gateway.batches import stored_files
from gateway.batches.database import CORRUPT, Database, Page, intact, page
from gateway.batches.job_row import Counts, Job, Status, find, read, write
from gateway.batches.lines import BOM, Line, Problem, Reply, answered, more_usage, parse, refused, unanswered
from gateway.json_text import JsonLimits, parse_json
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import Sealer

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


class Jobs:
    """The batches of all tenants."""

    def __init__(self, database: Database, *, max_active: int, limits: JsonLimits) -> None:
        self._database = database
        self._limits = limits  # of each line
        self._max_active = max_active  # of one tenant

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
            now = int(time.time())
            stored_files.find(connection, tenant, input_file, now)
            active = connection.execute(
                "SELECT count(*) FROM batches WHERE tenant = ? AND status IN (?,?,?)", (tenant, *ACTIVE)
            ).fetchone()[0]
            if active >= self._max_active:
                text = f"{active} batches are under way, the limit is {self._max_active}"
                raise LookonceError(ErrorKind.RATE_LIMITED, text, retry_after=60.0)
            document = _new_document(now, endpoint, input_file, metadata, lifetime, output_lifetime)
            identifier = "batch_" + secrets.token_hex(16)
            insert = "INSERT INTO batches (id, tenant, status) VALUES (?,?,'validating')"
            seq = connection.execute(insert, (identifier, tenant)).lastrowid
            return write(connection, Job(seq or 0, identifier, tenant, "validating", document, Counts()))

        return await self._database.run(work)

    async def get(self, tenant: str, identifier: str) -> Job:
        """Raises NOT_FOUND."""
        return await self._database.run(lambda connection: find(connection, tenant, identifier))

    async def page(self, tenant: str, *, after: str | None, limit: int) -> Page[Job]:
        """A page, newest first. Raises INVALID_ARGUMENT for an unknown `after`."""

        def work(connection: sqlite3.Connection) -> Page[Job]:
            rows = page(connection, "batches", "tenant = ?", (tenant,), after=after, limit=limit, newest_first=True)
            return rows.map(lambda some: intact(connection, "batches", some, read))

        return await self._database.run(work)

    async def cancel(self, tenant: str, identifier: str) -> Job:
        """Mark it for cancelling. Raises NOT_FOUND, and CONFLICT when it has ended."""

        def work(connection: sqlite3.Connection) -> Job:
            job = find(connection, tenant, identifier)
            if job.status == "cancelling":
                return job
            if job.status not in ACTIVE:
                raise LookonceError(ErrorKind.CONFLICT, f"the batch is {job.status}: it can't be cancelled")
            return _move(connection, job, "cancelling", cancelling_at=int(time.time()))

        return await self._database.run(work)

    async def active(self) -> list[Job]:
        """All that have not ended, oldest first."""
        query = "SELECT * FROM batches WHERE status IN (?,?,?) ORDER BY seq"
        return await self._database.run(
            lambda connection: intact(connection, "batches", connection.execute(query, ACTIVE).fetchall(), read)
        )

    async def begin(self, job: Job, check: Callable[[Line], Problem | None], *, max_lines: int) -> Job:
        """Read the input into lines: the batch is then in_progress, what is no request failed already. It failed when
        there is no request at all, or are too many, with errors that name their lines."""

        def work(connection: sqlite3.Connection) -> Job:
            now = int(time.time())
            current = find(connection, job.tenant, job.id)
            if current.status != "validating":
                return current
            try:
                stored = stored_files.find(connection, job.tenant, job.document["input_file_id"], now)
                raws = stored_files.split_lines(connection, stored)
                problems, counts = _insert_lines(connection, job, raws, check, max_lines, self._limits)
            except LookonceError:
                return _fail(connection, current, [Problem("file_not_found", "the input file is gone or damaged")], now)
            if problems:
                return _fail(connection, current, problems, now)
            return _move(connection, replace(current, counts=counts), "in_progress", in_progress_at=now)

        return await self._database.run(work)

    async def next_line(self, job: Job, after: int) -> Line | None:
        """The first pending line behind number `after`."""
        query = "SELECT * FROM lines WHERE batch = ? AND number > ? AND state = 'pending' ORDER BY number"

        def work(connection: sqlite3.Connection) -> Line | None:
            for row in connection.execute(query, (job.seq, after)):
                request = _SEALER.open(_line_key(job, row["number"], row["custom_id"], "request"), row["request"])
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
            sealed = _SEALER.seal(_line_key(job, line.number, line.custom_id, "result"), answered(line, reply))
            return _close_line(connection, job, line.number, column, sealed, reply)

        return await self._database.run(work)

    async def finish(self, job: Job, end: End) -> Job:
        """Write the output and error files and end the batch, together."""

        def work(connection: sqlite3.Connection) -> Job:
            now = int(time.time())
            current = find(connection, job.tenant, job.id)
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
    reply: Reply | None = None,
) -> bool:
    """Mark a pending line done, count it and the reply's tokens; whether it was pending."""
    done = connection.execute(
        "UPDATE lines SET state = ?, result = ?, request = NULL WHERE batch = ? AND number = ? AND state = 'pending'",
        (column, result, job.seq, number),
    ).rowcount
    if done:
        current = find(connection, job.tenant, job.id)
        counts = replace(current.counts, **{column: getattr(current.counts, column) + 1})
        usage = {"usage": more_usage(current.document.get("usage"), reply)} if reply is not None else {}
        write(connection, replace(current, counts=counts, document=current.document | usage))
    return bool(done)


def _line_key(job: Job, number: int, custom_id: str, part: str) -> bytes:
    return orjson.dumps([job.id, number, custom_id, part])


def _new_document(
    now: int, endpoint: str, input_file: str, metadata: dict[str, str] | None, lifetime: float, output_lifetime: float
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


def _insert_lines(
    connection: sqlite3.Connection,
    job: Job,
    raws: Iterable[bytes],
    check: Callable[[Line], Problem | None],
    max_lines: int,
    limits: JsonLimits,
) -> tuple[list[Problem], Counts]:
    """Why the batch can't begin, nothing when it can; and its counts then."""
    problems: list[Problem] = []
    seen: set[str] = set()
    total = 0
    for number, raw in enumerate(raws, 1):
        text = raw.removeprefix(BOM)
        if not text.strip():
            continue
        if total == max_lines:
            return [Problem("too_many_requests", f"the file has more than {max_lines} requests", number)], Counts()
        total += 1
        item = _checked(parse(text, number, limits), check, seen)
        custom_id = item.custom_id or ""
        row: tuple[int, int, str, bytes | None, str, bytes | None]
        if isinstance(item, Line):
            seen.add(custom_id)
            row = (
                job.seq,
                number,
                custom_id,
                _SEALER.seal(_line_key(job, number, custom_id, "request"), text),
                "pending",
                None,
            )
        else:
            if len(problems) < MAX_PROBLEMS:
                problems.append(item)
            result = _SEALER.seal(_line_key(job, number, custom_id, "result"), refused(item))
            row = (job.seq, number, custom_id, None, "failed", result)
        insert = "INSERT INTO lines (batch, number, custom_id, request, state, result) VALUES (?,?,?,?,?,?)"
        connection.execute(insert, row)
    if not seen:
        return problems or [Problem("empty_file", "the file has no requests")], Counts()
    return [], Counts(total, failed=total - len(seen))


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
        if row["result"] is None:
            return None
        opened = _SEALER.open(_line_key(job, row["number"], row["custom_id"], "result"), row["result"])
        if opened is None:
            log.error("an answer of a batch is damaged", batch=job.id, line=row["number"])
            CORRUPT.inc()
        return opened

    def results(failed: bool) -> Iterator[bytes | memoryview]:
        states = ("failed", "pending") if failed else ("completed", "completed")
        query = "SELECT * FROM lines WHERE batch = ? AND state IN (?,?) ORDER BY number"
        for row in connection.execute(query, (job.seq, *states)):
            yield result(row) or unanswered(row["custom_id"], code, message)

    def output(name: str, failed: bool) -> str | None:
        filename = f"{job.id}_{name}.jsonl"
        chunks = _chunks(results(failed))
        stored = stored_files.insert(connection, job.tenant, filename, "batch_output", chunks, now, expires)
        if stored.bytes:
            return stored.id
        connection.execute("DELETE FROM files WHERE seq = ?", (stored.seq,))
        return None

    return {"output_file_id": output("output", False), "error_file_id": output("error", True)}


def _chunks(texts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    buffer = bytearray()
    for text in texts:
        buffer += text
        if len(buffer) >= stored_files.CHUNK:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def _move(connection: sqlite3.Connection, job: Job, status: Status, **changes: Any) -> Job:
    return write(connection, replace(job, status=status, document=job.document | changes))
