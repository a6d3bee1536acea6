"""The services of a run, and how it lives through their absence: wait, say so, check that the models are the same.

A `ServiceConnection` is one service at one address. Calls that fail because it is away wait in one place until it
answers again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import LanguageClient, VisionClient
from lookonce.core.tasks import end_tasks, start_task
from lookonce.moderation.batch.encode_streams import EncodeStreams
from lookonce.moderation.batch.score_batching import ScoreCalls

C = TypeVar("C", bound=VisionClient | LanguageClient)
Check = Callable[[C], Awaitable[str]]
"""Names the process that answers; raises for another model."""
L = TypeVar("L", bound="ServiceConnection[Any]")
AWAY = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED, ErrorKind.CANCELLED})
FULL = frozenset({ErrorKind.OVERLOADED, ErrorKind.RATE_LIMITED})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds
_SHUNNED = 5.0  # seconds
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long the services may be away, in seconds, before the run ends (to be taken up again later)."""

    away: float = 1800.0
    call: float = 300.0  # longest a call may take


def pause(attempt: int, retry_after: float | None = None) -> float:
    """Seconds to wait before trying again: longer with each attempt, and not all at once."""
    longest = min(_LONGEST_PAUSE, max(_FIRST_PAUSE * 2 ** min(attempt, 10), retry_after or 0.0))
    return float(longest * random.uniform(0.5, 1.0))


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
        self._back = asyncio.Event()
        self._back.set()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def away(self) -> bool:
        """Whether it is being waited for."""
        return not self._back.is_set()

    @property
    def shunned(self) -> bool:
        """Whether others are better asked."""
        return time.monotonic() < self._shunned

    def shun(self) -> None:
        """It answers, but can't do what it is asked for: that is quickly said, and must not draw all pictures to it."""
        self._shunned = time.monotonic() + _SHUNNED

    def heard(self) -> None:
        """It has answered something."""
        self._heard = time.monotonic()

    async def look(self) -> str:
        """The process that answers now. Raises UNAVAILABLE, and what `check` raises."""
        self.process = await self._check(self.client)
        return self.process

    async def recover(self, error: LookonceError, attempt: int) -> str:
        """After a call failed: return when it is worth trying again, with the process that answered first. Raises
        UNAVAILABLE when patience is at its end, and what `check` raises."""
        if error.kind in AWAY:
            if self._watcher is None or self._watcher.done():
                self._back.clear()
                self._watcher = start_task(self._watch())
            await asyncio.shield(self._watcher)
        process = self.process
        await asyncio.sleep(pause(attempt, None if error.kind in AWAY else error.retry_after))
        if time.monotonic() - self._heard > self._patience.away:
            raise self._given_up()
        return process

    async def close(self) -> None:
        """Stop waiting, close the channel."""
        if self._watcher is not None:
            await end_tasks(self._watcher)
        await self.client.close()

    async def _watch(self) -> None:
        """Until it is back."""
        began, said, attempt = time.monotonic(), False, 0
        try:
            while not await self._is_back():
                away = time.monotonic() - began
                if not said and away > 1:
                    said = True
                    log.warning("waiting for a service", service=self.client.label, gives_up_after=self._patience.away)
                if time.monotonic() - self._heard > self._patience.away:
                    raise self._given_up()
                await asyncio.sleep(pause(attempt))
                attempt += 1
            if said:
                log.info("service is back", service=self.client.label, seconds=round(time.monotonic() - began, 1))
        finally:
            self._back.set()

    async def _is_back(self) -> bool:
        if not await self.client.healthy():
            return False
        try:
            await self.look()
        except LookonceError as error:
            if error.kind in AWAY:
                return False
            raise
        return True

    def _given_up(self) -> LookonceError:
        text = f"the {self.client.label} at {self.client.address} did not answer for {self._patience.away:g} s"
        return LookonceError(ErrorKind.UNAVAILABLE, text)


class VisionConnection(ServiceConnection[VisionClient]):
    """A vision service, with the streams that pictures go over."""

    def __init__(
        self, clients: Sequence[VisionClient], window: int, patience: Patience, check: Check[VisionClient]
    ) -> None:
        """One connection for each of `clients`, all to one address."""
        super().__init__(clients[0], patience, check)
        self.streams = EncodeStreams(clients, window)
        self._clients = clients

    async def close(self) -> None:
        """End the streams, close the channels."""
        await self.streams.close()
        await super().close()
        for client in self._clients[1:]:
            await client.close()


class LanguageConnection(ServiceConnection[LanguageClient]):
    """A language service, asked about a bounded number of pictures at once."""

    def __init__(
        self, client: LanguageClient, pictures: int, patience: Patience, check: Check[LanguageClient], *, isolated: bool
    ) -> None:
        """`isolated`: nothing that is scored beside a picture may change its scores."""
        super().__init__(client, patience, check)
        self.calls = ScoreCalls(client, pictures, isolated=isolated, timeout=patience.call)
        self.slots = asyncio.Semaphore(pictures)  # of follow-up questions

    async def close(self) -> None:
        """End the calls, close the channel."""
        await self.calls.close()
        await super().close()


class ServicePool(Generic[L]):
    """Equal services at several addresses; each call goes to the one with least to do, among those that can do it."""

    def __init__(self, service_pool: Sequence[L]) -> None:
        self.service_pool = service_pool

    @contextmanager
    def use(self) -> Iterator[L]:
        """The least busy that is not away; a waiting one when all are."""
        link = min(self.service_pool, key=lambda one: (one.away, one.shunned, one.active))
        link.active += 1
        try:
            yield link
        finally:
            link.active -= 1

    async def close(self) -> None:
        """Close all."""
        for link in self.service_pool:
            await link.close()
