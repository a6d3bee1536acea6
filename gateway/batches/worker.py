"""Works batches through: reads them in, has their lines answered a few at a time, ends them. Goes on after a restart
where the database says it was; a line under way at a crash is asked again, its answer is kept once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import structlog
from prometheus_client import Counter

from gateway.batches.database import Database
from gateway.batches.job_row import Job
from gateway.batches.jobs import End, Jobs
from gateway.batches.lines import Line, Problem, Reply
from gateway.batches.stored_files import Files
from gateway.routing.retries import pause
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.tasks import end_tasks, keep_running, start_task

LINES = Counter("lookonce_gateway_batch_lines", "Lines of batches, by what came of them.", ("outcome",))
SWEEP = 30.0  # seconds between looks at what has expired
FIRST_PAUSE, LAST_PAUSE = 0.2, 30.0  # seconds before a line that found no room is tried again
MAX_FAILURES = 8
"""Times a line may find the services failing while they say they serve: it may be the line that breaks them."""
LOOK = 0.1  # seconds after which a waiting line looks again whether others have their answers
log = structlog.get_logger(__name__)


class Endpoints(Protocol):
    """The routes that lines can be for."""

    def check(self, line: Line, endpoint: str) -> Problem | None:
        """What keeps the line from being for that endpoint."""
        ...

    async def answer(self, line: Line, tenant: str, *, last: bool) -> Reply:
        """The answer, errors of the request included. Raises OVERLOADED, RATE_LIMITED and UNAVAILABLE (ask again
        later) unless this is the `last` try."""
        ...


class Batches:
    """Files and batches over one database, and the background work on them, which begins with `start`."""

    def __init__(self, directory: Path, settings: GatewaySettings) -> None:
        """Raises INVALID_ARGUMENT or CONFLICT when the directory can't be used."""
        self._database = Database(directory)
        self.files = Files(self._database, quota=settings.max_stored_bytes)
        self.jobs = Jobs(self._database, max_active=settings.max_batches, limits=settings.json_limits)
        self._settings = settings
        self._woken = asyncio.Event()
        self._working: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, asyncio.Event] = {}
        self._main: asyncio.Task[None] | None = None
        self._until = 0.0  # on the loop's clock: how long lines under way may go on after `drain`

    def start(
        self, endpoints: Endpoints, *, interactive: Callable[[], int], reachable: Callable[[], Awaitable[bool]]
    ) -> None:
        """Work through what is there and what comes. `interactive`: requests of others under way; `reachable`: whether
        the services say that they serve. Call within the event loop."""
        self._endpoints, self._reachable = endpoints, reachable
        self._concurrency = ConcurrencyClasses(self._settings.batch_concurrency, interactive)
        self._main = keep_running(self._run)

    def wake(self) -> None:
        """There is a new batch."""
        self._woken.set()

    def cancel(self, identifier: str) -> None:
        """Stop the lines of a batch that was marked for cancelling."""
        if identifier in self._cancelled:
            self._cancelled[identifier].set()
        self.wake()

    def drain(self) -> None:
        """Begin no more lines; those under way get the grace time."""
        if self._main is not None:
            self._concurrency.closed = True
        self._until = asyncio.get_running_loop().time() + self._settings.drain_grace

    async def close(self) -> None:
        """Wait for the lines under way as long as `drain` allowed, stop, close the database."""
        if self._main is not None:
            self._concurrency.closed = True
            try:
                async with asyncio.timeout_at(self._until):
                    await self._concurrency.empty()
            except TimeoutError:
                log.info("batch lines under way are left for the next start", lines=self._concurrency.busy)
            await end_tasks(*self._working.values(), self._main)
        self._database.close()

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self.files.sweep()
                for job in await self.jobs.active():
                    if job.id not in self._working and not self._concurrency.closed:
                        self._begin(job)
            except LookonceError as error:
                log.warning("batches can't be looked at", reason=error.message)
            with suppress(TimeoutError):
                async with asyncio.timeout(SWEEP):
                    await self._woken.wait()

    def _begin(self, job: Job) -> None:
        task = start_task(self._work(job), awaited=False)
        self._working[job.id], self._cancelled[job.id] = task, asyncio.Event()
        task.add_done_callback(lambda _: self._ended(job.id))

    def _ended(self, identifier: str) -> None:
        del self._working[identifier], self._cancelled[identifier]

    async def _work(self, job: Job) -> None:
        try:
            end: End
            if job.status == "validating":
                endpoint = job.endpoint
                job = await self.jobs.begin(
                    job, lambda line: self._endpoints.check(line, endpoint), max_lines=self._settings.max_batch_lines
                )
                LINES.labels("failed").inc(job.counts.failed)
            if job.status == "in_progress":
                reached = await self._answer_lines(job)
                if reached is None:
                    return
                end = reached
            elif job.status == "cancelling":
                end = "cancelled"
            else:
                log.info("batch failed", batch=job.id, tenant=job.tenant)
                return
            job = await self.jobs.finish(job, end)
            log.info("batch ended", batch=job.id, tenant=job.tenant, status=job.status, lines=job.counts.total)
        except Exception:
            log.exception("a batch was interrupted; it goes on later", batch=job.id)

    async def _answer_lines(self, job: Job) -> End | None:
        """Answer what is pending until all is done, the batch expires or is cancelled; None when draining left lines
        for the next start."""
        cancelled = self._cancelled[job.id]
        feeding = start_task(self._feed(job))
        stopping = start_task(cancelled.wait())
        try:
            while not (feeding.done() or stopping.done()):
                left = job.expires_at - time.time()
                if left <= 0:
                    break
                await asyncio.wait({feeding, stopping}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()
                return "completed" if await self.jobs.next_line(job, 0) is None else None
            return "cancelled" if cancelled.is_set() else "expired"
        finally:
            await end_tasks(feeding, stopping)

    async def _feed(self, job: Job) -> None:
        after = 0
        async with asyncio.TaskGroup() as group:
            while True:
                await self._concurrency.enter()
                try:
                    line = await self.jobs.next_line(job, after)
                except BaseException:
                    self._concurrency.leave()
                    raise
                if line is None:
                    self._concurrency.leave()
                    return
                after = line.number
                task = group.create_task(self._line(job, line))
                task.add_done_callback(lambda _: self._concurrency.leave())

    async def _line(self, job: Job, line: Line) -> None:
        reply = await self._reply(job, line)
        if reply is not None and await self.jobs.record(job, line, reply):
            LINES.labels("completed" if reply.good else "failed").inc()

    async def _reply(self, job: Job, line: Line) -> Reply | None:
        """The answer; None when draining comes first. Waits for room and for the services to come back."""
        failures, tries = 0, 0
        while True:
            try:
                return await self._endpoints.answer(line, job.tenant, last=failures >= MAX_FAILURES)
            except LookonceError as error:
                log.info("a batch line waits", batch=job.id, line=line.number, reason=error.kind.value)
                failures += error.kind is ErrorKind.UNAVAILABLE and await self._reachable()
            while True:
                tries += 1
                await asyncio.sleep(pause(tries, FIRST_PAUSE, LAST_PAUSE))
                if self._concurrency.closed:
                    return None
                if await self._reachable():
                    break


class ConcurrencyClasses:
    """`limit` lines at once while nobody else is served, one while somebody is, none while draining."""

    def __init__(self, limit: int, interactive: Callable[[], int]) -> None:
        self._limit = limit
        self._interactive = interactive  # requests of others under way
        self._turn = asyncio.Lock()  # first come, first served
        self._freed = asyncio.Event()
        self.busy = 0
        self.closed = False

    async def enter(self) -> None:
        """Take a place, once there is one."""
        async with self._turn:
            while self.closed or self.busy >= (1 if self._interactive() else self._limit):
                self._freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK):
                        await self._freed.wait()
            self.busy += 1

    def leave(self) -> None:
        """Give the place back."""
        self.busy -= 1
        self._freed.set()

    async def empty(self) -> None:
        """Return when no line is under way."""
        while self.busy:
            self._freed.clear()
            await self._freed.wait()
