"""How images reach the services: over streams to the vision service, in batches to the language service."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.rpc.client import Encoded, LanguageClient, VisionClient, encoded_from_proto
from lookonce.core.rpc.messages import from_proto
from lookonce.core.tasks import end_tasks, start_task
from protos.lookonce.v1 import language_pb2, vision_pb2

STREAM_SECONDS = 6 * 3600.0
"""Deadline of one stream; what is under way when it passes is sent again over the next."""


class EncodeStream:
    """One connection. Opened when first used, and again after it broke."""

    def __init__(self, client: VisionClient, window: int) -> None:
        self.client = client
        self._slots = asyncio.Semaphore(window)
        self._waiting: dict[int, asyncio.Future[Encoded]] = {}
        self._outgoing: asyncio.Queue[vision_pb2.EncodeStreamRequest | None] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._next = 0

    @property
    def active(self) -> int:
        return len(self._waiting)

    async def encode(self, request: vision_pb2.EncodeRequest, *, timeout: float) -> Encoded:
        """Waits for a place in the window. Raises what the service says of the image, UNAVAILABLE when the
        connection breaks, DEADLINE_EXCEEDED after `timeout` seconds."""
        async with self._slots:
            if self._reader is None or self._reader.done():
                self._outgoing = asyncio.Queue()
                self._reader = start_task(self._read(self._outgoing))
            number, self._next = self._next, self._next + 1
            future: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
            self._waiting[number] = future
            self._outgoing.put_nowait(vision_pb2.EncodeStreamRequest(id=number, request=request))
            try:
                async with asyncio.timeout(timeout):
                    return await future
            except TimeoutError as error:
                text = "the vision service took too long over an image"
                raise LookonceError(ErrorKind.DEADLINE_EXCEEDED, text) from error
            finally:
                self._waiting.pop(number, None)

    async def close(self) -> None:
        self._outgoing.put_nowait(None)
        if self._reader is not None:
            await end_tasks(self._reader)

    async def _read(self, outgoing: asyncio.Queue[vision_pb2.EncodeStreamRequest | None]) -> None:
        ended = LookonceError(ErrorKind.UNAVAILABLE, "the vision service ended the stream")
        try:
            async for message in self.client.encode_stream(_requests(outgoing), timeout=STREAM_SECONDS):
                future = self._waiting.get(message.id)
                if future is None or future.done():
                    continue
                if message.WhichOneof("payload") == "error":
                    future.set_exception(from_proto(message.error))
                else:
                    future.set_result(encoded_from_proto(message.result))
        except LookonceError as error:
            ended = error
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ended)


async def _requests(
    outgoing: asyncio.Queue[vision_pb2.EncodeStreamRequest | None],
) -> AsyncIterator[vision_pb2.EncodeStreamRequest]:
    while (request := await outgoing.get()) is not None:
        yield request


class EncodeStreams:
    """Several connections to one address; an image goes over the one with fewest under way."""

    def __init__(self, clients: Sequence[VisionClient], window: int) -> None:
        self._streams = [EncodeStream(client, window) for client in clients]

    async def encode(self, image: bytes, *, max_pixels: int | None, timeout: float) -> tuple[EmbeddingReference, str]:
        """The image's reference, and "hit", "miss" or "coalesced"."""
        request = vision_pb2.EncodeRequest(image=image)
        if max_pixels is not None:
            request.max_pixels = max_pixels
        stream = min(self._streams, key=lambda one: one.active)
        encoded = await stream.encode(request, timeout=timeout)
        return encoded.reference, encoded.outcome

    async def close(self) -> None:
        """End all streams; channels stay with whoever opened them."""
        for stream in self._streams:
            await stream.close()


_CALLS = 2
"""Under way at once: the service has the next when it is done with one."""
_MOST_ITEMS = 512
"""Of one call with more than one image; the service takes 1,024."""
Items = Sequence[language_pb2.ScoreItem]
Results = list[language_pb2.ScoreResult]


class ScoreCalls:
    """`score` is called once for each image, from any number of tasks."""

    def __init__(self, client: LanguageClient, images: int, *, isolated: bool, timeout: float) -> None:
        """At most about `images` are with the service; `timeout` is that of a call, in seconds. `isolated`: nothing
        scored beside an image may change its scores, whatever call it comes in."""
        self._client = client
        self._images = -(-images // _CALLS)
        self._calls = min(_CALLS, images)
        self._isolated = isolated
        self._timeout = timeout
        self._waiting: deque[tuple[Items, asyncio.Future[Results]]] = deque()
        self._under_way: set[asyncio.Task[None]] = set()

    async def score(self, items: Items) -> Results:
        """Results in the order of `items`. Raises what the call raises."""
        future: asyncio.Future[Results] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, future))
        self._send()
        return await future

    async def close(self) -> None:
        """Give up what is under way."""
        calls = list(self._under_way)
        await end_tasks(*calls)

    def _send(self) -> None:
        while self._waiting and len(self._under_way) < self._calls:
            call = start_task(self._call(self._take()))
            self._under_way.add(call)
            call.add_done_callback(self._ended)

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._under_way.discard(call)
        if not call.cancelled():
            self._send()

    def _take(self) -> list[tuple[Items, asyncio.Future[Results]]]:
        taken = [self._waiting.popleft()]
        count = len(taken[0][0])
        while self._waiting and len(taken) < self._images and count + len(self._waiting[0][0]) <= _MOST_ITEMS:
            taken.append(self._waiting.popleft())
            count += len(taken[-1][0])
        return taken

    async def _call(self, batch: Sequence[tuple[Items, asyncio.Future[Results]]]) -> None:
        wanted = [(items, future) for items, future in batch if not future.done()]  # others have gone meanwhile
        if not wanted:
            return
        # `alone`: services of the last release know it by that name
        request = language_pb2.ScoreRequest(timeout=self._timeout, isolated=self._isolated, alone=self._isolated)
        for items, _ in wanted:
            request.items.extend(items)
        try:
            response = await self._client.score(request, timeout=self._timeout + 1)
            if len(response.results) != len(request.items):
                raise LookonceError(ErrorKind.INTERNAL, "the language service answered with another number of results")
            at = 0
            for items, future in wanted:
                if not future.done():
                    future.set_result(list(response.results[at : at + len(items)]))
                at += len(items)
        except LookonceError as error:
            for _, future in wanted:
                if not future.done():
                    future.set_exception(LookonceError(error.kind, error.message, retry_after=error.retry_after))
        except Exception as error:  # whatever it is, those who wait are told
            for _, future in wanted:
                if not future.done():
                    future.set_exception(error)
            raise
        finally:
            for _, future in wanted:
                future.cancel()  # nothing, unless this call was given up
