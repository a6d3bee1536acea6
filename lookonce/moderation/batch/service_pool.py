"""The services of a run, and how it lives through their absence: wait, say so, check that the models are the same.

A `ServiceConnection` is one service at one address. Calls that fail because it is away wait in one place until it
answers again. `Attempts` owns what an image may take in all, whatever fails.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from lookonce.core.backoff import Backoff
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import LanguageClient, VisionClient
from lookonce.core.tasks import end_tasks, start_task
from lookonce.moderation.batch.service_calls import EncodeStreams, ScoreCalls

C = TypeVar("C", bound=VisionClient | LanguageClient)
T = TypeVar("T")
Check = Callable[[C], Awaitable[str]]
"""Names the process that answers; raises for another model."""
L = TypeVar("L", bound="ServiceConnection[Any]")
AWAY = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED, ErrorKind.CANCELLED})
FULL = frozenset({ErrorKind.OVERLOADED, ErrorKind.RATE_LIMITED})
LOST = frozenset({ErrorKind.EMBEDDING_MISSING, ErrorKind.EMBEDDING_INVALID})
MOST_TRIES = 12
"""Of what can be the image's own doing, such as an embedding that is lost again and again, before it is given up.
Tries that fail because a language service can't reach the vision service are not counted: those take patience."""
_PAUSES = (0.1, 5.0)  # seconds: the first and the longest
_SHUNNED = 5.0  # seconds
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long the services may be away, in seconds, before the run ends (to be taken up again later)."""

    away: float = 1800.0
    call: float = 300.0  # longest a call may take


class Attempts:
    """At one image, over all calls that judging it takes."""

    def __init__(self, patience: Patience) -> None:
        self.unreachable_since = math.inf  # monotonic seconds; when services first could not reach each other
        self._patience = patience
        self._backoff = Backoff(*_PAUSES)
        self._failures = 0

    def are_spent(self, error: LookonceError) -> bool:
        """Whether to give up after this error, INTERNAL or in LOST."""
        now = time.monotonic()
        if error.kind in LOST and error.retry_after is not None:  # the services can't reach each other
            self.unreachable_since = min(self.unreachable_since, now)
        else:
            self._failures += 1
        return self._failures == MOST_TRIES or now - self.unreachable_since > self._patience.away

    async def pause(self, error: LookonceError) -> None:
        """Before the next attempt."""
        await self._backoff.sleep(None if error.kind in AWAY else error.retry_after)


async def when_back(
    client: VisionClient | LanguageClient, ask: Callable[[], Awaitable[T]], patience: Patience, heard: float
) -> T:
    """What `ask` answers, as soon as the service is there. Raises UNAVAILABLE when patience is at its end, counted from
    `heard` (monotonic seconds), and what else `ask` raises."""
    began, said, backoff = time.monotonic(), False, Backoff(*_PAUSES)
    while True:
        try:
            answer = await ask()
        except LookonceError as error:
            if error.kind not in AWAY:
                raise
            check_patience(client, patience, heard)
            if not said and time.monotonic() - began > 1:
                said = True
                log.warning("waiting for a service", service=client.label, gives_up_after=patience.away)
            await backoff.sleep()
        else:
            if said:
                log.info("service is back", service=client.label, seconds=round(time.monotonic() - began, 1))
            return answer


def check_patience(client: VisionClient | LanguageClient, patience: Patience, heard: float) -> None:
    """Raise UNAVAILABLE when the service has been away for too long."""
    if time.monotonic() - heard > patience.away:
        text = f"the {client.label} at {client.address} did not answer for {patience.away:g} s"
        raise LookonceError(ErrorKind.UNAVAILABLE, text)


class ServiceConnection(Generic[C]):
    """`check` is called when the service is back, before anything is asked of it."""

    def __init__(self, client: C, patience: Patience, check: Check[C]) -> None:
        self.client = client
        self.active = 0
        self.process = ""  # that answered last when it was looked at
        self._patience = patience
        self._check = check
        self._heard = time.monotonic()  # the last answer
        self._shunned = 0.0  # until then
        self._watcher: asyncio.Task[str] | None = None

    @property
    def away(self) -> bool:
        """Whether it is being waited for."""
        return self._watcher is not None and not self._watcher.done()

    @property
    def shunned(self) -> bool:
        """Whether others are better asked."""
        return time.monotonic() < self._shunned

    def shun(self) -> None:
        """It answers, but can't do what it is asked for: that is quickly said, and must not draw all images to it."""
        self._shunned = time.monotonic() + _SHUNNED

    def heard(self) -> None:
        """It has answered something."""
        self._heard = time.monotonic()

    async def look(self) -> str:
        """The process that answers now. Raises UNAVAILABLE, and what `check` raises."""
        self.process = await self._check(self.client)
        return self.process

    async def recover(self, error: LookonceError, attempts: Attempts) -> str:
        """After a call failed: return when it is worth trying again, with the process that answered first. Raises
        UNAVAILABLE when patience is at its end, and what `check` raises."""
        if error.kind in AWAY:
            if self._watcher is None or self._watcher.done():
                self._watcher = start_task(when_back(self.client, self._look_if_well, self._patience, self._heard))
            await asyncio.shield(self._watcher)
        process = self.process
        await attempts.pause(error)
        check_patience(self.client, self._patience, self._heard)
        return process

    async def close(self) -> None:
        if self._watcher is not None:
            await end_tasks(self._watcher)
        await self.client.close()

    async def _look_if_well(self) -> str:
        if not await self.client.healthy():
            raise LookonceError(ErrorKind.UNAVAILABLE, f"the {self.client.label} is not serving")
        return await self.look()


class VisionConnection(ServiceConnection[VisionClient]):
    """A vision service, with the streams that images go over."""

    def __init__(
        self, clients: Sequence[VisionClient], window: int, patience: Patience, check: Check[VisionClient]
    ) -> None:
        """One connection for each of `clients`, all to one address."""
        super().__init__(clients[0], patience, check)
        self.streams = EncodeStreams(clients, window)
        self._clients = clients

    async def close(self) -> None:
        await self.streams.close()
        await super().close()
        for client in self._clients[1:]:
            await client.close()


class LanguageConnection(ServiceConnection[LanguageClient]):
    """A language service, asked about a bounded number of images at once."""

    def __init__(
        self, client: LanguageClient, images: int, patience: Patience, check: Check[LanguageClient], *, isolated: bool
    ) -> None:
        """`isolated`: nothing that is scored beside an image may change its scores."""
        super().__init__(client, patience, check)
        self.calls = ScoreCalls(client, images, isolated=isolated, timeout=patience.call)
        self.slots = asyncio.Semaphore(images)  # of follow-up questions

    async def close(self) -> None:
        await self.calls.close()
        await super().close()


class ServicePool(Generic[L]):
    """Equal services at several addresses; each call goes to the one with least to do, among those that can do it."""

    def __init__(self, connections: Sequence[L]) -> None:
        self._connections = connections

    @contextmanager
    def use(self) -> Iterator[L]:
        """The least busy that is not away; a waiting one when all are."""
        connection = min(self._connections, key=lambda one: (one.away, one.shunned, one.active))
        connection.active += 1
        try:
            yield connection
        finally:
            connection.active -= 1

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()
