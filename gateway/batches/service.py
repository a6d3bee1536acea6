"""Files and batches together, over one database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from gateway.batches.concurrency_classes import ConcurrencyClasses
from gateway.batches.database import Database
from gateway.batches.jobs import Jobs
from gateway.batches.stored_files import Files
from gateway.batches.worker import Endpoints, Runner
from gateway.json_text import JsonLimits


class Batches:
    """What the routes use; `start` begins the background work."""

    def __init__(
        self,
        directory: Path,
        *,
        quota: int,
        max_active: int,
        max_lines: int,
        concurrency: int,
        grace: float,
        limits: JsonLimits,
    ) -> None:
        """Raises INVALID_ARGUMENT or CONFLICT when the directory can't be used."""
        self._database = Database(directory)
        self.files = Files(self._database, quota=quota)
        self.jobs = Jobs(self._database, max_active=max_active, limits=limits)
        self._max_lines = max_lines
        self._concurrency = concurrency
        self._grace = grace  # seconds
        self.runner: Runner | None = None

    def start(
        self, endpoints: Endpoints, *, interactive: Callable[[], int], reachable: Callable[[], Awaitable[bool]]
    ) -> None:
        """Work through what is there and what comes. `interactive`: requests of others under way."""
        lanes = ConcurrencyClasses(self._concurrency, interactive)
        self.runner = Runner(self.jobs, self.files, endpoints, lanes, reachable=reachable, max_lines=self._max_lines)
        self.runner.start()

    def drain(self) -> None:
        """Begin no more lines."""
        if self.runner is not None:
            self.runner.drain(self._grace)

    def wake(self) -> None:
        """There is a new batch."""
        if self.runner is not None:
            self.runner.wake()

    def cancel(self, identifier: str) -> None:
        """Stop the lines of a batch that was marked for cancelling."""
        if self.runner is not None:
            self.runner.cancel(identifier)

    async def close(self) -> None:
        """Stop working, close the database."""
        if self.runner is not None:
            await self.runner.close()
        self._database.close()
