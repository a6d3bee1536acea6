"""The loop: read, judge, record, write parts. Any number of images under way, memory for a bounded number of them.

Workers take inputs in order; each reads one, finds out whether its bytes are known already, judges it if not, and hands
the row to the recorder. The recorder commits rows to the ledger a few times a second and writes each part as soon as
all of its rows, and all before them, are known.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import structlog

from lookonce.core.errors import LookonceError
from lookonce.core.identity import image_digest
from lookonce.core.tasks import end_tasks, start_task
from lookonce.moderation.batch.judge import Judge
from lookonce.moderation.batch.outcome import Failure, Outcome, Row, Timings
from lookonce.moderation.batch.results import Counts
from lookonce.moderation.batch.run import Run
from lookonce.moderation.batch.sources.items import Item
from lookonce.moderation.batch.sources.reader import Reader

PARTS_AHEAD = 32  # beyond the first part that is not complete
LISTED_AT_ONCE = 64
COMMIT_SECONDS = 0.2
_INLINE_DIGEST_BYTES = 256 << 10
log = structlog.get_logger(__name__)


@dataclass
class Tally:
    """How far the run is, what earlier processes did of it included."""

    done: int = 0  # rows known
    failed: int = 0
    flagged: int = 0
    duplicates: int = 0

    @classmethod
    def of(cls, begun: Counts) -> Tally:
        """Where a process begins."""
        return cls(begun.rows, begun.errors.total(), begun.flagged, begun.duplicates)

    def count(self, row: Row, outcome: Outcome | None, *, fired: bool, first: bool) -> None:
        """One more row; whether any rule fired, and whether it is the first row of its image."""
        self.done += 1
        self.failed += (row.failure or (outcome.failure if outcome else None)) is not None
        self.duplicates += not first and row.digest is not None
        self.flagged += fired


class ByteBudget:
    """Bytes of images in memory. Who comes when it is spent waits; what a read brings may go beyond it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._room = asyncio.Event()
        self._room.set()

    async def wait(self) -> None:
        """Until there is room."""
        await self._room.wait()

    def add(self, size: int) -> None:
        """Take (or, negative, give back)."""
        self._used += size
        if self._used < self._limit:
            self._room.set()
        else:
            self._room.clear()


class Job:
    """One process's work on a run; once `stopped`, it ends after what is under way."""

    def __init__(
        self,
        run: Run,
        inputs: Iterator[Item],
        reader: Reader,
        judge: Judge,
        stopped: Callable[[], bool],
        *,
        under_way: int,
        max_bytes: int,
        on_progress: Callable[[Tally], None],
    ) -> None:
        self.tally = Tally.of(run.begun)
        self._stopped = stopped
        self._run = run
        self._inputs = inputs
        self._reader = reader
        self._judge = judge
        self._under_way = under_way
        self._budget = ByteBudget(max_bytes)
        self._progress = on_progress
        self._judging: dict[bytes, asyncio.Future[Outcome]] = {}
        self._listed: list[Item] = []
        self._listing = asyncio.Lock()
        self._ended = False
        self._over = asyncio.Event()
        self._rows: list[Row] = []
        self._outcomes: dict[bytes, Outcome] = {}

    async def work(self) -> bool:
        """Work until every input is in a part, or until stopped; whether all are. What is known when it ends for
        whatever reason is recorded."""
        recorder = start_task(self._record_now_and_then())
        workers = {start_task(self._worker()) for _ in range(self._under_way)}
        try:
            pending: set[asyncio.Task[None]] = {*workers, recorder}
            while workers & pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            await end_tasks(*workers)
            self._over.set()
            await recorder  # not cancelled: rows that it has in hand would be lost
        return await self._run.complete()

    async def _worker(self) -> None:
        while not self._stopped() and (item := await self._next()) is not None:
            await self._run.wait_near(item.index, PARTS_AHEAD)
            await self._budget.wait()
            await self._one(item)

    async def _next(self) -> Item | None:
        """The next input without a row."""
        async with self._listing:
            while not self._listed and not self._ended:
                batch = await asyncio.to_thread(list, islice(self._inputs, LISTED_AT_ONCE))
                self._ended = len(batch) < LISTED_AT_ONCE
                if batch:
                    self._run.listed(batch[-1].index + 1)
                self._listed = [item for item in reversed(batch) if not self._run.has(item.index)]
                if self._ended:
                    await self._run.listing_ended()
            return self._listed.pop() if self._listed else None

    async def _one(self, item: Item) -> None:
        try:
            data, read_ms = await self._reader.read(item)
        except LookonceError as error:
            self._keep(Row(item.index, item.name, failure=Failure.of(error)), None, first=False)
            return
        size = len(data)
        self._budget.add(size)
        try:
            digest = await _digest(data)
            outcome, timings, first = await self._outcome(item.index, digest, data)
        finally:
            self._budget.add(-size)
        del data
        timings = replace(timings, read_ms=round(read_ms, 3))
        if first:
            self._outcomes[digest] = outcome
        self._keep(Row(item.index, item.name, digest, timings=timings), outcome, first=first)
        if first:
            self._judging.pop(digest).set_result(outcome)  # after its row, which stands before those of duplicates

    async def _outcome(self, index: int, digest: bytes, data: bytes) -> tuple[Outcome, Timings, bool]:
        """What comes of the bytes, what this worker took to find out, and whether no row has them yet: then the caller
        keeps one."""
        under_way = self._judging.get(digest)
        if under_way is not None:
            return await asyncio.shield(under_way), Timings(), False
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._judging[digest] = future
        try:
            if (kept := self._outcomes.get(digest)) is not None:
                known: tuple[Outcome, bool] | None = (kept, True)
            else:
                known = await self._run.outcome(digest, index)
            if known is None:
                return *await self._judge.judge(data), True
            outcome, has_row = known
            if has_row:
                self._judging.pop(digest).set_result(outcome)
            return outcome, Timings(), not has_row
        except BaseException as error:
            self._judging.pop(digest, None)
            if isinstance(error, LookonceError):
                future.set_exception(error)
                future.exception()  # nobody may be waiting
            else:
                future.cancel()
            raise

    def _keep(self, row: Row, outcome: Outcome | None, *, first: bool) -> None:
        self._rows.append(row)
        self.tally.count(row, outcome, fired=self._run.fired(outcome), first=first)
        self._progress(self.tally)

    async def _record_now_and_then(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMMIT_SECONDS):
                    await self._over.wait()
            await self._record()
        await self._record()  # what came while the last was being written

    async def _record(self) -> None:
        rows, self._rows = self._rows, []
        outcomes = dict(self._outcomes)  # they stay known here until they are in the ledger
        if rows:
            await self._run.record(rows, outcomes)
            for digest in outcomes:
                self._outcomes.pop(digest, None)


async def _digest(data: bytes) -> bytes:
    if len(data) <= _INLINE_DIGEST_BYTES:
        return image_digest(data)
    return await asyncio.to_thread(image_digest, data)
