"""Images to the vision service over EncodeStream: several connections, each with a bounded window of images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.rpc.client import Encoded, VisionClient, encoded_from_proto
from lookonce.core.rpc.messages import from_proto
from lookonce.core.tasks import end_tasks, start_task
from protos.lookonce.v1 import vision_pb2

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
