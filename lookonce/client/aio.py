"""The asynchronous client: the same names as the blocking one, on the same calls. What each does is told there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import httpx2
import tenacity

from lookonce.client import calls, vector_calls
from lookonce.client.calls import Call, TextAssembly
from lookonce.client.connection import Connection, EventReader, streaming
from lookonce.client.exceptions import StreamInterrupted
from lookonce.client.request_options import (
    ChatOptions,
    PixelOptions,
    Progress,
    Question,
    QuestionOptions,
    given,
    reporting,
    without_none,
)
from lookonce.client.response_types import Answer, Erasure, ImageBase, ImageInfo, Model, Moderation

if TYPE_CHECKING:
    from typing import Self, Unpack

    from lookonce.client.request_options import ImageSource
    from lookonce.client.vector_calls import Ranked, Search, Vector, VectorOptions

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio.

    >>> async with lookonce.AsyncClient() as client:
    ...     image = await client.image("photo.jpg")
    ...     answer = await image.ask("What is in the image?")
    ...     async for piece in await image.ask("Describe it.", stream=True):
    ...         print(piece, end="", flush=True)
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | httpx2.Timeout | None = None,
        retries: int = 3,
        http_client: httpx2.AsyncClient | None = None,
    ) -> None:
        self._connection = Connection.of(base_url, api_key, timeout, retries)
        self._http = http_client or httpx2.AsyncClient(**self._connection.http_options())

    async def image(
        self,
        source: ImageSource | None = None,
        *,
        picture: ImageSource | None = None,
        **bounds: Unpack[PixelOptions],
    ) -> AsyncImage:
        """See Client.image. Files are read in a thread."""
        said: Any = without_none(bounds)
        call = await asyncio.to_thread(calls.upload, given(source, picture), said)
        return AsyncImage(self, await self._send(call), said)

    async def models(self) -> list[Model]:
        return await self._send(calls.models())

    async def moderate(self, *content: Any) -> Moderation:
        return await self._send(calls.moderate(content))

    async def embed(
        self,
        inputs: Sequence[Any],
        *,
        dimensions: int | None = None,
        input_type: Literal["query", "document"] | None = None,
        **options: Unpack[VectorOptions],
    ) -> list[Vector]:
        return await self._send(vector_calls.embed(inputs, options, dimensions, input_type))

    async def rerank(
        self, query: Any, documents: Iterable[Any], *, top_n: int | None = None, **options: Unpack[VectorOptions]
    ) -> list[Ranked]:
        return await self._send(vector_calls.rerank(query, documents, options, top_n))

    async def search(
        self,
        query: Any,
        *,
        top_n: int = 10,
        limit: int | None = None,
        after: str | None = None,
        **options: Unpack[VectorOptions],
    ) -> Search:
        return await self._send(vector_calls.search(query, options, top_n, limit, after))

    @overload
    async def chat(
        self,
        messages: str | Iterable[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> Answer: ...

    @overload
    async def chat(
        self,
        messages: str | Iterable[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> AsyncTextStream: ...

    async def chat(
        self,
        messages: str | Iterable[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Answer | AsyncTextStream:
        call = calls.chat(messages, options, model, stream=stream)
        if stream:
            return AsyncTextStream(await self._open(call))
        return await self._send(call)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, call: Call[T]) -> T:
        async def once() -> T:
            return self._connection.result(call, await self._reply(call))

        return await tenacity.AsyncRetrying(**self._connection.attempts(call))(once)

    async def _open(self, call: Call[Any]) -> httpx2.Response:
        """An answer that has begun, to be closed."""
        return await tenacity.AsyncRetrying(**self._connection.attempts(call))(self._reply, call, stream=True)

    async def _reply(self, call: Call[Any], *, stream: bool = False) -> httpx2.Response:
        with self._connection.reaching():
            reply = await self._http.send(self._http.build_request(**self._connection.request(call)), stream=stream)
            if reply.status_code >= 300:
                await reply.aread()
        self._connection.check(reply)
        return reply


class AsyncImage(ImageBase):
    """An image that the gateway has; made by `AsyncClient.image`."""

    def __init__(self, client: AsyncClient, info: ImageInfo, bounds: PixelOptions) -> None:
        super().__init__(info, bounds)
        self._client = client

    @overload
    async def ask(
        self, question: str, *, stream: Literal[False] = False, **options: Unpack[QuestionOptions]
    ) -> Answer: ...

    @overload
    async def ask(
        self, question: str, *, stream: Literal[True], **options: Unpack[QuestionOptions]
    ) -> AsyncTextStream: ...

    async def ask(
        self, question: str, *, stream: bool = False, **options: Unpack[QuestionOptions]
    ) -> Answer | AsyncTextStream:
        if stream:
            return AsyncTextStream(await self._client._open(calls.ask_stream(self.id, question, self._within(options))))
        return await self._client._send(calls.ask(self.id, question, self._within(options)))

    async def ask_many(
        self, questions: Iterable[str | Question], *, progress: Progress = False, **options: Unpack[QuestionOptions]
    ) -> list[Answer]:
        asked = list(questions) if not isinstance(questions, str) else questions
        answers: dict[int, Answer] = {}
        try:
            with reporting(progress, len(asked)) as report:
                async with aclosing(self._answers(asked, options)) as arriving:
                    async for place, answer in arriving:
                        answers[place] = answer
                        report(len(answers))
        except StreamInterrupted as error:
            error.answers = [answers[place] for place in sorted(answers)]
            raise
        return [answers[place] for place in range(len(answers))]

    async def ask_as_completed(
        self, questions: Iterable[str | Question], **options: Unpack[QuestionOptions]
    ) -> AsyncIterator[Answer]:
        async with aclosing(self._answers(questions, options)) as arriving:
            async for _, answer in arriving:
                yield answer

    async def score(
        self, question: str, choices: Sequence[str], **options: Unpack[QuestionOptions]
    ) -> dict[str, float]:
        return calls.chosen(await self._client._send(calls.ask(self.id, question, self._within(options), choices)))

    async def score_many(
        self,
        questions: Iterable[str],
        choices: Sequence[str],
        *,
        progress: Progress = False,
        **options: Unpack[QuestionOptions],
    ) -> list[dict[str, float]]:
        asked = [Question(question, choices=choices) for question in questions]
        return [calls.chosen(answer) for answer in await self.ask_many(asked, progress=progress, **options)]

    async def refresh(self) -> Self:
        self._info = await self._client._send(calls.look(self.id))
        return self

    async def delete(self) -> Erasure:
        return await self._client._send(calls.erase(self.id))

    async def _answers(
        self, questions: Iterable[str | Question], options: QuestionOptions
    ) -> AsyncGenerator[tuple[int, Answer], None]:
        for batch in calls.batches(self.id, questions, self._within(options)):
            seen = 0
            async with aclosing(await self._client._open(batch.call)) as reply, aclosing(events_of(reply)) as events:
                async for event in events:
                    yield batch.answer(event)
                    seen += 1
            batch.check(seen)


class AsyncTextStream:
    """See TextStream: `async for piece in stream`, then `await stream.answer()`."""

    def __init__(self, reply: httpx2.Response) -> None:
        self._reply = reply
        self._assembly = TextAssembly()
        self._pieces = self._read()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    @property
    def text(self) -> str:
        """What has come so far."""
        return self._assembly.text

    async def answer(self) -> Answer:
        """The whole answer; reads what is left of it."""
        async for _ in self._pieces:
            pass
        return self._assembly.answer()

    async def close(self) -> None:
        await self._pieces.aclose()
        await self._reply.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _read(self) -> AsyncGenerator[str, None]:
        try:
            async with aclosing(events_of(self._reply)) as events:
                async for event in events:
                    if piece := self._assembly.take(event):
                        yield piece
        except StreamInterrupted as error:
            error.text = self.text
            raise
        finally:
            await self._reply.aclose()


async def events_of(reply: httpx2.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The events of an answer that has begun."""
    reader = EventReader()
    with streaming():
        async for chunk in reply.aiter_bytes():
            for event in reader.feed(chunk):
                yield event
    reader.end()
