"""Answers: embeddings resolved, a replica chosen, lost embeddings made again, dead replicas replaced. No HTTP here."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

from gateway.conversation import Caller, ChoiceQuestion, ImagePart, Turn, images_of, routing_key, to_messages
from gateway.images.library import ImageLibrary, Resolved
from gateway.metrics import VARIANT_REQUESTS, VARIANT_SECONDS
from gateway.routing.retries import STALE, Recovery
from gateway.routing.variants import Variant, Variants
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.status_codes import from_proto
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
    """Asks the language replicas on behalf of all doors.

    One variant of the model answers a request, all its images encoded by the same variant; another stands in only when
    it is out of order and nothing of the answer is out."""

    def __init__(self, images: ImageLibrary, variants: Variants, *, reconnect_wait: float) -> None:
        self._images = images
        self._variants = variants
        self._reconnect_wait = reconnect_wait  # seconds
        self.interactive = 0  # calls under way for askers who wait

    def generate(
        self, turns: Sequence[Turn], sampling: language_pb2.SamplingParameters, caller: Caller, *, whole: bool = False
    ) -> Answering:
        """Stream the events of an answer; of a `whole` one, nothing before it has ended. Close the iterator to stop the
        work.

        A replica that fails before the first event is replaced in silence, as are lost embeddings; afterwards the
        failure is raised from the iterator."""
        resolved: list[Resolved] = []
        return Answering(self._events(turns, sampling, caller, resolved, whole), resolved)

    async def complete(
        self, turns: Sequence[Turn], sampling: language_pb2.SamplingParameters, caller: Caller
    ) -> tuple[list[Completion], list[Resolved]]:
        """The whole of an answer (or n). Nothing was shown yet: a replica that dies midway costs one more try."""
        for last in (False, True):
            answering = self.generate(turns, sampling, caller, whole=True)
            try:
                return await collect(answering, max(1, sampling.n)), answering.resolved
            except LookonceError as error:
                if last or error.kind is not ErrorKind.UNAVAILABLE or not answering.started:
                    raise
        raise LookonceError(ErrorKind.INTERNAL, "no answer")

    async def score(
        self, questions: Sequence[ChoiceQuestion], caller: Caller
    ) -> tuple[list[language_pb2.ItemScores | LookonceError], language_pb2.LanguageReceipt, list[Resolved]]:
        """Weigh the choices of all questions in one call: an outcome for each, in order."""
        images = [part for question in questions for part in images_of(question.turns)]
        deadline = time.monotonic() + caller.timeout
        candidates = self._candidates(images)
        for served in candidates:
            try:
                with _measured(served):
                    return await self._score(served, questions, images, caller, deadline, served is candidates[-1])
            except LookonceError as error:
                if error.kind is not ErrorKind.UNAVAILABLE or served is candidates[-1]:
                    raise
        raise LookonceError(ErrorKind.INTERNAL, "no answer")

    async def _score(
        self,
        served: Variant,
        questions: Sequence[ChoiceQuestion],
        images: Sequence[ImagePart],
        caller: Caller,
        deadline: float,
        last: bool,
    ) -> tuple[list[language_pb2.ItemScores | LookonceError], language_pb2.LanguageReceipt, list[Resolved]]:
        resolved: list[Resolved] = []
        await self._resolve(served, images, caller, resolved)
        key, replicas = routing_key(questions[0].turns, caller.tenant.cache_salt), served.language

        async def renew(error: LookonceError) -> bool:
            return await self._renew(served, images, caller, resolved, error)

        patience = self._reconnect_wait if last else 0.0
        recovery = Recovery(replicas, key, patience=patience, renew=renew)
        while True:
            endpoint = recovery.choose()
            left = _left(deadline)
            request = _score_request(questions, resolved, caller, left)
            try:
                with self._counted(caller), replicas.use(endpoint) as client:
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
                replicas.succeeded(endpoint)
                return outcomes, response.receipt, resolved

    async def _events(
        self,
        turns: Sequence[Turn],
        sampling: language_pb2.SamplingParameters,
        caller: Caller,
        resolved: list[Resolved],
        whole: bool,
    ) -> AsyncGenerator[language_pb2.GenerateEvent, None]:
        deadline = time.monotonic() + caller.timeout
        candidates = self._candidates(images_of(turns))
        for served in candidates:
            last, started = served is candidates[-1], False
            try:
                with _measured(served):
                    attempt = self._attempt(served, turns, sampling, caller, resolved, deadline, last, whole)
                    async with aclosing(attempt) as events:
                        async for event in events:
                            started = True
                            yield event
                return
            except LookonceError as error:
                if started or last or error.kind is not ErrorKind.UNAVAILABLE:
                    raise

    async def _attempt(
        self,
        served: Variant,
        turns: Sequence[Turn],
        sampling: language_pb2.SamplingParameters,
        caller: Caller,
        resolved: list[Resolved],
        deadline: float,
        last: bool,
        whole: bool,
    ) -> AsyncGenerator[language_pb2.GenerateEvent, None]:
        images, replicas = images_of(turns), served.language
        await self._resolve(served, images, caller, resolved)

        async def renew(error: LookonceError) -> bool:
            return await self._renew(served, images, caller, resolved, error)

        patience = self._reconnect_wait if last else 0.0
        key = routing_key(turns, caller.tenant.cache_salt)
        recovery = Recovery(replicas, key, patience=patience, renew=renew)
        while True:
            endpoint, started = recovery.choose(), False
            left = _left(deadline)
            request = language_pb2.GenerateRequest(
                request_id=uuid.uuid4().hex,
                messages=to_messages(turns, resolved),
                sampling=sampling,
                timeout=left,
                client=caller.client,
                whole=whole,
                cache_salt=caller.tenant.cache_salt,
            )
            try:
                with self._counted(caller), replicas.use(endpoint) as client:
                    async with aclosing(client.generate(request, timeout=left + SPARE_SECONDS)) as events:  # type: ignore[type-var]
                        async for event in events:
                            started = True
                            yield event
            except LookonceError as error:
                await recovery.recover(error, endpoint, started=started)
            else:
                replicas.succeeded(endpoint)
                return

    @contextmanager
    def _counted(self, caller: Caller) -> Iterator[None]:
        self.interactive += not caller.background
        try:
            yield
        finally:
            self.interactive -= not caller.background

    def _candidates(self, images: Sequence[ImagePart]) -> list[Variant]:
        """The variant that answers, by the first image or at random, and those that may stand in."""
        return self._variants.in_order(images[0].record.digest if images else uuid.uuid4().bytes)

    async def _resolve(
        self, served: Variant, images: Sequence[ImagePart], caller: Caller, resolved: list[Resolved]
    ) -> None:
        async def one(part: ImagePart) -> Resolved:
            if part.resolved is not None and part.resolved.variant == served.name:
                return part.resolved
            return await self._images.resolve(
                part.record, caller.tenant, part.max_pixels, served=served, data=part.data
            )

        resolved[:] = await _each(images, one)

    async def _renew(
        self,
        served: Variant,
        images: Sequence[ImagePart],
        caller: Caller,
        resolved: list[Resolved],
        stale: LookonceError,
    ) -> bool:
        """Encode the images again. Raises `stale` when a file is gone but the embedding may be there after all."""

        async def one(part: ImagePart) -> Resolved:
            try:
                return await self._images.renew(
                    part.record, caller.tenant, part.max_pixels, served=served, data=part.data
                )
            except LookonceError as error:
                if error.kind is ErrorKind.NOT_FOUND and stale.retry_after is not None:
                    raise stale from error
                raise

        resolved[:] = await _each(images, one)
        return bool(images)


@contextmanager
def _measured(served: Variant) -> Iterator[None]:
    """Count a request to a variant, and the time to its end."""
    started, outcome = time.perf_counter(), "ok"
    try:
        yield
    except LookonceError as error:
        outcome = error.kind.value
        raise
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "cancelled"
        raise
    finally:
        VARIANT_REQUESTS.labels(served.name, outcome).inc()
        VARIANT_SECONDS.labels(served.name).observe(time.perf_counter() - started)


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
    questions: Sequence[ChoiceQuestion], resolved: Sequence[Resolved], caller: Caller, timeout: float
) -> language_pb2.ScoreRequest:
    request = language_pb2.ScoreRequest(
        request_id=uuid.uuid4().hex, timeout=timeout, client=caller.client, cache_salt=caller.tenant.cache_salt
    )
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
        raise LookonceError(
            ErrorKind.DEADLINE_EXCEEDED, "the deadline passed: --request-timeout of the gateway is the longest"
        )
    return left
