"""The window of a bidirectional stream: reads a request only when there is room, hands out answers as each finishes.

An item leaves the window when the client has taken its answer, so a client that doesn't read is not read from either.
Its id is free as soon as the answer is on its way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Generic, TypeVar

import structlog

from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.tasks import end_tasks, start_task
from protos.lookonce.v1 import vision_pb2

A = TypeVar("A")
Outcome = tuple[int, A | LookonceError]
log = structlog.get_logger(__name__)


class EncodeWindow(Generic[A]):
    """Iterate over it, inside `async with`, for (id, answer or error) pairs. Leaving cancels what is under way.

    Raises UNAVAILABLE once `end` was called and what was read is answered; INVALID_ARGUMENT, ending the stream, when a
    request's id is that of another one still under way: nobody could tell their answers apart.
    """

    def __init__(
        self,
        requests: AsyncIterator[vision_pb2.EncodeStreamRequest],
        answer: Callable[[vision_pb2.EncodeRequest], Awaitable[A]],
        window: int,
    ) -> None:
        self._requests = requests
        self._answer = answer
        self._slots = asyncio.Semaphore(window)
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._finished: asyncio.Queue[Outcome[A] | None] = asyncio.Queue()  # None: no more requests
        self._reader: asyncio.Task[None] | None = None

    def end(self) -> None:
        """Read no more requests."""
        if self._reader is not None:
            self._reader.cancel()

    async def __aenter__(self) -> EncodeWindow[A]:
        self._reader = start_task(self._read())
        self._reader.add_done_callback(lambda _: self._finished.put_nowait(None))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._reader, *self._under_way.values()) if task is not None]
        await end_tasks(*tasks)

    async def __aiter__(self) -> AsyncIterator[Outcome[A]]:
        ended = False
        while not (ended and not self._under_way):
            outcome = await self._finished.get()
            if outcome is None:
                ended = True
                if self._reader is not None and not self._reader.cancelled():
                    self._reader.result()  # raises what ended it early
                continue
            del self._under_way[outcome[0]]  # before the client has the answer, and may use its id again
            yield outcome
            self._slots.release()
        if self._reader is not None and self._reader.cancelled():
            raise LookonceError(ErrorKind.UNAVAILABLE, "the vision service is stopping", retry_after=1.0)

    async def _read(self) -> None:
        requests = aiter(self._requests)
        while True:
            await self._slots.acquire()
            try:
                item = await anext(requests)
            except StopAsyncIteration:
                return
            if item.id in self._under_way:
                raise invalid(f"id {item.id} is that of another image still under way", param="id")
            self._under_way[item.id] = start_task(self._work(item))

    async def _work(self, item: vision_pb2.EncodeStreamRequest) -> None:
        outcome: A | LookonceError
        try:
            outcome = await self._answer(item.request)
        except LookonceError as error:
            outcome = error
        except Exception:  # the edge of one item: nothing foreign may leak, the others go on
            log.exception("image of a stream failed")
            outcome = LookonceError(ErrorKind.INTERNAL, "internal error")
        self._finished.put_nowait((item.id, outcome))
