"""Answers: embeddings resolved, a replica chosen, lost embeddings made again, dead replicas replaced. No HTTP here."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

from gateway.conversation import Asker, ChoiceQuestion, ImagePart, Turn, images_of, routing_key, to_messages
from gateway.images import ImageLibrary, Resolved
from gateway.recovery import STALE, Recovery
from gateway.replicas import Replicas
from lookonce.errors import ErrorKind, LookonceError
from lookonce.rpc.client import LanguageClient
from lookonce.rpc.errors import from_proto
from protos.lookonce.v1 import language_pb2

SPARE_SECONDS = 1.0
"""The call's own deadline comes this much after the service's, whose error says more."""


@dataclass
class Answering:
    """One request being answered: events to iterate over, and the embeddings they were made from."""

    events: AsyncGenerator[language_pb2.GenerateEvent, None]
    resolved: list[Resolved] = field(default_factory=list)  # complete once the first event is there
    started: bool = False  # an event was read


@dataclass
class Completion:
    """One whole answer of n."""

    text: str = ""
    logprobs: list[language_pb2.TokenLogprob] = field(default_factory=list)
    finish: language_pb2.Finish | None = None


class Answers:
    """Asks the language replicas on behalf of all doors."""

    def __init__(self, images: ImageLibrary, replicas: Replicas[LanguageClient], *, reconnect_wait: float) -> None:
        self._images = images
        self._replicas = replicas
        self._reconnect_wait = reconnect_wait  # seconds
        self.interactive = 0  # calls under way for askers who wait

    def generate(self, turns: Sequence[Turn], sampling: language_pb2.SamplingParameters, asker: Asker) -> Answering:
        """Stream the events of an answer. Close the iterator to stop the work.

        A replica that fails before the first event is replaced in silence, as are lost embeddings; afterwards the
        failure is raised from the iterator."""
        resolved: list[Resolved] = []
        return Answering(self._events(turns, sampling, asker, resolved), resolved)

    async def complete(
        self, turns: Sequence[Turn], sampling: language_pb2.SamplingParameters, asker: Asker
    ) -> tuple[list[Completion], list[Resolved]]:
        """The whole of an answer (or n). Nothing was shown yet: a replica that dies midway costs one more try."""
        for last in (False, True):
            answering = self.generate(turns, sampling, asker)
            try:
                return await collect(answering, max(1, sampling.n)), answering.resolved
            except LookonceError as error:
                if last or error.kind is not ErrorKind.UNAVAILABLE or not answering.started:
                    raise
        raise LookonceError(ErrorKind.INTERNAL, "no answer")

    async def score(
        self, questions: Sequence[ChoiceQuestion], asker: Asker
    ) -> tuple[list[language_pb2.ItemScores | LookonceError], language_pb2.LanguageReceipt, list[Resolved]]:
        """Weigh the choices of all questions in one call: an outcome for each, in order."""
        images = [part for question in questions for part in images_of(question.turns)]
        resolved: list[Resolved] = []
        await self._resolve(images, asker, resolved)
        key = routing_key(questions[0].turns)
        deadline = time.monotonic() + asker.timeout

        async def renew(_: LookonceError) -> bool:
            return await self._renew(images, asker, resolved)

        recovery = Recovery(self._replicas, key, patience=self._reconnect_wait, renew=renew)
        while True:
            endpoint = recovery.choose()
            left = _left(deadline)
            request = _score_request(questions, resolved, asker, left)
            try:
                with self._counted(asker), self._replicas.use(endpoint) as client:
                    response = await client.score(request, timeout=left + SPARE_SECONDS)
                outcomes = [_outcome(result) for result in response.results]
                if len(outcomes) != len(questions):
                    raise LookonceError(ErrorKind.INTERNAL, "the language service answered another number of questions")
                stale = [item for item in outcomes if isinstance(item, LookonceError) and item.kind in STALE]
                if stale and not recovery.renewed:
                    raise stale[0]
            except LookonceError as error:
                await recovery.recover(error, endpoint)
            else:
                self._replicas.succeeded(endpoint)
                return outcomes, response.receipt, resolved

    async def _events(
        self,
        turns: Sequence[Turn],
        sampling: language_pb2.SamplingParameters,
        asker: Asker,
        resolved: list[Resolved],
    ) -> AsyncGenerator[language_pb2.GenerateEvent, None]:
        images = images_of(turns)
        deadline = time.monotonic() + asker.timeout
        await self._resolve(images, asker, resolved)

        async def renew(_: LookonceError) -> bool:
            return await self._renew(images, asker, resolved)

        recovery = Recovery(self._replicas, routing_key(turns), patience=self._reconnect_wait, renew=renew)
        while True:
            endpoint, started = recovery.choose(), False
            left = _left(deadline)
            request = language_pb2.GenerateRequest(
                request_id=uuid.uuid4().hex,
                messages=to_messages(turns, resolved),
                sampling=sampling,
                timeout=left,
                client=asker.client,
            )
            try:
                with self._counted(asker), self._replicas.use(endpoint) as client:
                    async with aclosing(client.generate(request, timeout=left + SPARE_SECONDS)) as events:  # type: ignore[type-var]
                        async for event in events:
                            started = True
                            yield event
            except LookonceError as error:
                await recovery.recover(error, endpoint, started=started)
            else:
                self._replicas.succeeded(endpoint)
                return

    @contextmanager
    def _counted(self, asker: Asker) -> Iterator[None]:
        self.interactive += not asker.background
        try:
            yield
        finally:
            self.interactive -= not asker.background

    async def _resolve(self, images: Sequence[ImagePart], asker: Asker, resolved: list[Resolved]) -> None:
        async def one(part: ImagePart) -> Resolved:
            return part.resolved or await self._images.resolve(part.record, asker.tenant, part.max_pixels)

        resolved[:] = await _each(images, one)

    async def _renew(self, images: Sequence[ImagePart], asker: Asker, resolved: list[Resolved]) -> bool:
        async def one(part: ImagePart) -> Resolved:
            return await self._images.renew(part.record, asker.tenant, part.max_pixels)

        resolved[:] = await _each(images, one)
        return bool(images)


async def collect(answering: Answering, n: int) -> list[Completion]:
    """Read all events into n completions, in order of index."""
    completions = [Completion() for _ in range(n)]
    async with aclosing(answering.events) as events:
        async for event in events:
            answering.started = True
            which = event.WhichOneof("event")
            item = event.delta if which == "delta" else event.finish
            if item.index >= n:
                raise LookonceError(ErrorKind.INTERNAL, "the language service answered more often than asked")
            completion = completions[item.index]
            if which == "delta":
                completion.text += event.delta.text
                completion.logprobs.extend(event.delta.logprobs)
            else:
                completion.finish = event.finish
    if any(completion.finish is None for completion in completions):
        raise LookonceError(ErrorKind.UNAVAILABLE, "the language service ended an answer early", retry_after=1.0)
    return completions


async def _each(images: Sequence[ImagePart], call: Callable[[ImagePart], Awaitable[Resolved]]) -> list[Resolved]:
    """`call` for each distinct image and variant, concurrently; results in the order of `images`."""
    if len(images) == 1:
        return [await call(images[0])]
    distinct = {(part.record.digest, part.max_pixels): part for part in images}
    found = await asyncio.gather(*(call(part) for part in distinct.values()))
    by_key = dict(zip(distinct, found, strict=True))
    return [by_key[part.record.digest, part.max_pixels] for part in images]


def _score_request(
    questions: Sequence[ChoiceQuestion], resolved: Sequence[Resolved], asker: Asker, timeout: float
) -> language_pb2.ScoreRequest:
    request = language_pb2.ScoreRequest(request_id=uuid.uuid4().hex, timeout=timeout, client=asker.client)
    position = 0
    for number, question in enumerate(questions):
        count = len(images_of(question.turns))
        messages = to_messages(question.turns, resolved[position : position + count])
        request.items.add(id=str(number), messages=messages, choices=question.choices)
        position += count
    return request


def _outcome(result: language_pb2.ScoreResult) -> language_pb2.ItemScores | LookonceError:
    return from_proto(result.error) if result.WhichOneof("outcome") == "error" else result.scores


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise LookonceError(ErrorKind.DEADLINE_EXCEEDED, "the deadline passed")
    return left
