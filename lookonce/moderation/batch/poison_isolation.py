"""One call to one of several services, repeated until it is answered, however often services go away meanwhile.

An image that kills a service whenever it is asked about would be asked about for ever, and take others' work with it.
So an image that was under way when a connection was lost, several times, is tried in isolation: nothing else of this
run is under way at any service. A service that was there, under the number of its process, and that another process has
replaced afterwards, has died of it. After two such deaths the same is asked about a plain image of our own: if that
is answered, the service is well, and the image is to blame. Whatever doesn't end a process, such as a pause or a
network that is gone, proves nothing and takes patience as ever.
"""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.moderation.batch.service_pool import AWAY, FULL, LOST, Attempts, ServiceConnection, ServicePool

L = TypeVar("L", bound=ServiceConnection[Any])
S = TypeVar("S")
T = TypeVar("T")
_LOSSES = 3
"""Connections lost while an image was under way, before it is tried in isolation."""
_DEATHS = 2
"""Of services that were asked about one image in isolation, before it is to blame."""
_PLAIN_SIDE = 64  # pixels
log = structlog.get_logger(__name__)


class ServiceCrashed(Exception):
    """The image that was asked about is to blame; the text says of what service."""


class Suspected(Exception):
    """The image must be tried in isolation, which is for another process to do."""


class SharedLock:
    """Held by any number of tasks together or by one alone, who goes before those that come later."""

    def __init__(self) -> None:
        self._sharing = 0
        self._exclusive = asyncio.Lock()
        self._open = asyncio.Event()  # nobody holds it alone, or waits to
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        while not self._open.is_set():
            await self._open.wait()
        self._sharing += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._sharing -= 1
            if not self._sharing:
                self._empty.set()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Once the others are done."""
        async with self._exclusive:
            self._open.clear()
            try:
                await self._empty.wait()
                yield
            finally:
                self._open.set()


class PoisonIsolation:
    """Of one run: what is tried in isolation is alone among all that goes through here."""

    def __init__(self, *, trials: bool = True) -> None:
        """Without `trials`, because other processes of the run ask the same services, `Suspected` is raised instead."""
        self._trials = trials
        self._lock = SharedLock()

    async def run(
        self,
        pool: ServicePool[L],
        call: Callable[[L, S], Awaitable[T]],
        subject: S,
        plain: Callable[[], Awaitable[S]],
        attempts: Attempts,
    ) -> T:
        """What `call` answers about `subject`; `plain` makes one that no service can stumble over.

        Raises what waiting for the service can't help, UNAVAILABLE when patience is at its end, and ServiceCrashed."""
        losses = deaths = 0
        while True:
            with pool.use() as connection:
                process = ""
                try:
                    if losses < _LOSSES:
                        async with self._lock.shared():
                            result = await call(connection, subject)
                    else:
                        async with self._lock.exclusive():
                            process = await connection.look()
                            result = await call(connection, subject)
                except LookonceError as error:
                    if error.kind in LOST:
                        connection.shun()
                    if error.kind not in AWAY | FULL:
                        raise
                    back = await connection.recover(error, attempts)
                    if error.kind is not ErrorKind.UNAVAILABLE:
                        continue
                    losses += 1
                    if losses == _LOSSES and not self._trials:
                        raise Suspected from error
                    if process not in ("", back):
                        deaths += 1
                        log.warning("a service died of one image", service=connection.client.label, times=deaths)
                        if deaths >= _DEATHS and await self._is_well(connection, call, plain):
                            raise ServiceCrashed(_crashed(connection.client.label, deaths)) from error
                else:
                    connection.heard()
                    return result

    async def _is_well(
        self, connection: L, call: Callable[[L, S], Awaitable[object]], plain: Callable[[], Awaitable[S]]
    ) -> bool:
        """Whether it answers about a plain image."""
        async with self._lock.exclusive():
            try:
                await call(connection, await plain())
            except LookonceError as error:
                if error.kind in AWAY | FULL | LOST:
                    return False
                raise
        connection.heard()
        return True


async def plain_image() -> bytes:
    """A PNG of one colour, most likely one that no store has seen."""
    from PIL import Image

    colour = tuple(random.randrange(256) for _ in range(3))
    buffer = io.BytesIO()
    Image.new("RGB", (_PLAIN_SIDE, _PLAIN_SIDE), colour).save(buffer, "PNG")
    return buffer.getvalue()


def _crashed(service: str, deaths: int) -> str:
    times = "twice" if deaths == _DEATHS else f"{deaths} times"
    return f"the {service} died {times} when it was asked about this image alone, and was well with another"
