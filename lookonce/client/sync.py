"""The blocking client."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
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


class Client:
    """A gateway, spoken to over one pool of connections. Use as a context manager, or call `close`.

    >>> with lookonce.Client("http://127.0.0.1:8000") as client:
    ...     image = client.image("photo.jpg")
    ...     print(image.ask("What is in the image?"))

    `base_url` and `api_key` default to LOOKONCE_URL and LOOKONCE_API_KEY. `timeout` is in seconds, between bytes (600
    by default; 5 to connect), or httpx2's Timeout. A call that could not connect, or was answered 429 or 503, is tried
    `retries` more times, after the pause the gateway asks for; never once an answer has begun. `http_client` replaces
    the client's own, for a proxy or a private certificate authority. May be shared by threads. Raises LookonceError
    (see lookonce.client.exceptions for the kinds).
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | httpx2.Timeout | None = None,
        retries: int = 3,
        http_client: httpx2.Client | None = None,
    ) -> None:
        self._connection = Connection.of(base_url, api_key, timeout, retries)
        self._http = http_client or httpx2.Client(**self._connection.http_options())

    def image(
        self,
        source: ImageSource | None = None,
        *,
        picture: ImageSource | None = None,
        **bounds: Unpack[PixelOptions],
    ) -> Image:
        """Upload an image once: a path, bytes, PIL image, http(s) or data: URL. An id is looked up instead. With
        `min_pixels` or `max_pixels` it is resized within them now, and for whatever is asked of this object.

        >>> client.image("photo.jpg").tokens
        391

        Raises ImageError for what is no image, NotFoundError for an unknown id.
        """
        said: Any = without_none(bounds)
        return Image(self, self._send(calls.upload(given(source, picture), said)), said)

    def models(self) -> list[Model]:
        """The models served."""
        return self._send(calls.models())

    def moderate(self, *content: Any) -> Moderation:
        """Judge texts and images together by the gateway's policy. Images are those of this client, or the API's
        parts.

        >>> verdict = client.moderate(image, "Brand new, never worn")
        >>> verdict.flagged, verdict.scores
        (False, {'weapon': 0.01, 'counterfeit': 0.2})

        Raises BadRequestError when the gateway has no policy.
        """
        return self._send(calls.moderate(content))

    def embed(
        self,
        inputs: Sequence[Any],
        *,
        dimensions: int | None = None,
        input_type: Literal["query", "document"] | None = None,
        **options: Unpack[VectorOptions],
    ) -> list[Vector]:
        """Vectors of texts and images, as an embedding model makes them: images are those of this client, or the API's
        objects; a list within the list is one input of several parts.

        >>> door, text = client.embed([image, "a red door"])
        >>> sum(a * b for a, b in zip(door, text, strict=True))
        0.61

        Raises BadRequestError when the gateway has no embedding model.
        """
        return self._send(vector_calls.embed(inputs, options, dimensions, input_type))

    def rerank(
        self, query: Any, documents: Iterable[Any], *, top_n: int | None = None, **options: Unpack[VectorOptions]
    ) -> list[Ranked]:
        """Order texts and images by how they compare with a text, an image, or several parts as one; best first.

        >>> client.rerank("a red door", [image, "A blue gate."])[0].index
        0
        """
        return self._send(vector_calls.rerank(query, documents, options, top_n))

    def search(
        self,
        query: Any,
        *,
        top_n: int = 10,
        limit: int | None = None,
        after: str | None = None,
        **options: Unpack[VectorOptions],
    ) -> Search:
        """The gateway's kept images that are most like a text or an image, best first: `limit` of the newest ones are
        looked at, or of those older than the one of the id `after`.

        >>> [found.id for found in client.search("a red door", top_n=3).found]
        ['img_k2fz5m7q...']
        """
        return self._send(vector_calls.search(query, options, top_n, limit, after))

    @overload
    def chat(
        self,
        messages: str | Iterable[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> Answer: ...

    @overload
    def chat(
        self,
        messages: str | Iterable[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> TextStream: ...

    def chat(
        self,
        messages: str | Iterable[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Answer | TextStream:
        """Answer a conversation, OpenAI's messages. Strings and images may stand in `content` as they are. Pixel bounds
        hold for all images, beside those that an image has.

        >>> client.chat([{"role": "user", "content": [left, right, "What differs?"]}]).text
        'The right one has a red door.'
        """
        call = calls.chat(messages, options, model, stream=stream)
        return TextStream(self._open(call)) if stream else self._send(call)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        return tenacity.Retrying(**self._connection.attempts(call))(
            lambda: self._connection.result(call, self._reply(call))
        )

    def _open(self, call: Call[Any]) -> httpx2.Response:
        """An answer that has begun, to be closed."""
        return tenacity.Retrying(**self._connection.attempts(call))(self._reply, call, stream=True)

    def _reply(self, call: Call[Any], *, stream: bool = False) -> httpx2.Response:
        with self._connection.reaching():
            reply = self._http.send(self._http.build_request(**self._connection.request(call)), stream=stream)
            if reply.status_code >= 300:
                reply.read()
        self._connection.check(reply)
        return reply


class Image(ImageBase):
    """An image that the gateway has; made by `Client.image`."""

    def __init__(self, client: Client, info: ImageInfo, bounds: PixelOptions) -> None:
        super().__init__(info, bounds)
        self._client = client

    @overload
    def ask(self, question: str, *, stream: Literal[False] = False, **options: Unpack[QuestionOptions]) -> Answer: ...

    @overload
    def ask(self, question: str, *, stream: Literal[True], **options: Unpack[QuestionOptions]) -> TextStream: ...

    def ask(self, question: str, *, stream: bool = False, **options: Unpack[QuestionOptions]) -> Answer | TextStream:
        """Answer a question; with `stream`, iterate over the text as it is written.

        >>> answer = image.ask("What does the sign say?", max_tokens=20)
        >>> answer.text, answer.receipt.embedding
        ('No parking', 'hit')
        >>> for piece in image.ask("Describe the image.", stream=True):
        ...     print(piece, end="", flush=True)
        """
        if stream:
            return TextStream(self._client._open(calls.ask_stream(self.id, question, self._within(options))))
        return self._client._send(calls.ask(self.id, question, self._within(options)))

    def ask_many(
        self, questions: Iterable[str | Question], *, progress: Progress = False, **options: Unpack[QuestionOptions]
    ) -> list[Answer]:
        """Answer any number of questions, 1000 to a request; the answers are in the order asked.

        One that failed has `error` and the others stand. `progress` is True for a bar on stderr, or a function of
        (done, total).

        >>> [str(answer) for answer in image.ask_many(["Is it day?", "How many cars?"], progress=True)]
        ['Yes', '3']

        Raises StreamInterrupted, with the answers so far, if the connection breaks.
        """
        asked = list(questions) if not isinstance(questions, str) else questions
        answers: dict[int, Answer] = {}
        try:
            with reporting(progress, len(asked)) as report, closing(self._answers(asked, options)) as arriving:
                for place, answer in arriving:
                    answers[place] = answer
                    report(len(answers))
        except StreamInterrupted as error:
            error.answers = [answers[place] for place in sorted(answers)]
            raise
        return [answers[place] for place in range(len(answers))]

    def ask_as_completed(
        self, questions: Iterable[str | Question], **options: Unpack[QuestionOptions]
    ) -> Iterator[Answer]:
        """The same, each answer as soon as it is there; `id` says which: the question's own, else its place ("0")."""
        with closing(self._answers(questions, options)) as arriving:
            for _, answer in arriving:
                yield answer

    def score(self, question: str, choices: Sequence[str], **options: Unpack[QuestionOptions]) -> dict[str, float]:
        """The probability of each choice as the answer; they sum to 1. `system`, `detail` and the pixel bounds
        are the only options that matter.

        >>> image.score("Is it red?", ["yes", "no"])
        {'yes': 0.97, 'no': 0.03}
        """
        return calls.chosen(self._client._send(calls.ask(self.id, question, self._within(options), choices)))

    def score_many(
        self,
        questions: Iterable[str],
        choices: Sequence[str],
        *,
        progress: Progress = False,
        **options: Unpack[QuestionOptions],
    ) -> list[dict[str, float]]:
        """`score` for each question, in the order asked. The first failure is raised; for one outcome each, give
        `ask_many` Questions with choices."""
        asked = [Question(question, choices=choices) for question in questions]
        return [calls.chosen(answer) for answer in self.ask_many(asked, progress=progress, **options)]

    def refresh(self) -> Self:
        """Ask the gateway for the image's state again. Raises NotFoundError once it is erased or expired."""
        self._info = self._client._send(calls.look(self.id))
        return self

    def delete(self) -> Erasure:
        """Erase the file, its embeddings and all cached state made from them, in every process."""
        return self._client._send(calls.erase(self.id))

    def _answers(
        self, questions: Iterable[str | Question], options: QuestionOptions
    ) -> Generator[tuple[int, Answer], None, None]:
        for batch in calls.batches(self.id, questions, self._within(options)):
            seen = 0
            with closing(self._client._open(batch.call)) as reply, closing(events_of(reply)) as events:
                for event in events:
                    yield batch.answer(event)
                    seen += 1
            batch.check(seen)


class TextStream:
    """An answer while it is written: iterate over its pieces. Then `answer()` is the whole, with usage and receipt
    (closed early, without).

    Closing it early, or leaving its context, stops the work at the gateway. Raises StreamInterrupted, with the text
    so far, when the connection breaks.
    """

    def __init__(self, reply: httpx2.Response) -> None:
        self._reply = reply
        self._assembly = TextAssembly()
        self._pieces = self._read()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def text(self) -> str:
        """What has come so far."""
        return self._assembly.text

    def answer(self) -> Answer:
        """The whole answer; reads what is left of it."""
        for _ in self._pieces:
            pass
        return self._assembly.answer()

    def close(self) -> None:
        """Stop."""
        self._pieces.close()
        self._reply.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Generator[str, None, None]:
        try:
            with closing(events_of(self._reply)) as events:
                for event in events:
                    if piece := self._assembly.take(event):
                        yield piece
        except StreamInterrupted as error:
            error.text = self.text
            raise
        finally:
            self._reply.close()


def events_of(reply: httpx2.Response) -> Generator[dict[str, Any], None, None]:
    """The events of an answer that has begun."""
    reader = EventReader()
    with streaming():
        for chunk in reply.iter_bytes():
            yield from reader.feed(chunk)
    reader.end()
