"""Answers: embeddings resolved, a replica chosen, lost embeddings made again, dead replicas replaced; and their
receipts. No HTTP here."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gateway.conversation import Caller, ChoiceQuestion, ImagePart, Turn
from gateway.images.encoder import Resolved
from gateway.images.library import ImageLibrary
from gateway.metrics import ANSWERS, FIRST_TOKEN_SECONDS, TOKENS, VARIANT_REQUESTS, VARIANT_SECONDS
from gateway.routing.replicas import Endpoint
from gateway.routing.retries import STALE, Attempts
from gateway.routing.variants import DEFAULT, Variants
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import LanguageClient
from lookonce.core.rpc.messages import from_proto
from lookonce.core.telemetry import tracing
from protos.lookonce.v1 import language_pb2

GRACE_SECONDS = 1.0
"""The call's own deadline comes this much after the service's, whose error says more."""
SLOWNESS = {"hit": 0, "coalesced": 1, "miss": 2}


@dataclass
class Answering:
    """One request being answered: events to iterate over, and the embeddings they were made from."""

    events: AsyncGenerator[language_pb2.GenerateEvent, None]
    resolved: list[Resolved] = field(default_factory=list)  # complete once the first event is there


@dataclass
class Completion:
    """One whole answer of n."""

    text: str = ""
    logprobs: list[language_pb2.TokenLogprob] = field(default_factory=list)
    finish: language_pb2.Finish = field(default_factory=language_pb2.Finish)


class Answers:
    """Asks the language replicas on behalf of all doors.

    One variant of the model answers a request, all its images encoded by the same variant; another stands in only when
    it is out of order and nothing of the answer is out."""

    def __init__(self, images: ImageLibrary, variants: Variants, *, reconnect_wait: float) -> None:
        self.images = images
        self.variants = variants
        self.reconnect_wait = reconnect_wait  # seconds
        self.interactive = 0  # calls under way for callers who wait

    def generate(
        self,
        turns: Sequence[Turn],
        sampling: language_pb2.SamplingParameters,
        caller: Caller,
        tools: language_pb2.Tools | None = None,
        template: language_pb2.TemplateOptions | None = None,
    ) -> Answering:
        """Stream the events of an answer. Close the iterator to stop the work.

        A replica that fails before the first event is replaced in silence, as are lost embeddings; afterwards the
        failure is raised from the iterator."""
        asking = _Asking(self, _images_of(turns), turns, caller)
        return Answering(asking.stream(partial(asking.generate, turns, sampling, tools, template)), asking.resolved)

    async def complete(
        self,
        turns: Sequence[Turn],
        sampling: language_pb2.SamplingParameters,
        caller: Caller,
        tools: language_pb2.Tools | None = None,
        template: language_pb2.TemplateOptions | None = None,
    ) -> tuple[list[Completion], list[Resolved]]:
        """The whole of an answer (or n)."""
        asking = _Asking(self, _images_of(turns), turns, caller)

        async def call(client: LanguageClient) -> list[Completion]:
            async with aclosing(asking.generate(turns, sampling, tools, template, client, whole=True)) as events:
                return await collect(events, max(1, sampling.n))

        return await asking.run(call), asking.resolved

    async def score(
        self, questions: Sequence[ChoiceQuestion], caller: Caller
    ) -> tuple[list[language_pb2.ItemScores | LookonceError], language_pb2.LanguageReceipt, list[Resolved]]:
        """The probabilities of the choices of all questions in one call: an outcome for each, in order."""
        images = [part for question in questions for part in _images_of(question.turns)]
        asking = _Asking(self, images, questions[0].turns, caller)
        outcomes, receipt = await asking.run(partial(asking.score, questions))
        return outcomes, receipt, asking.resolved


class _Asking(Attempts[LanguageClient]):
    """The tries of one request to the language services. Its images are encoded by the variant that answers."""

    def __init__(self, answers: Answers, images: Sequence[ImagePart], first: Sequence[Turn], caller: Caller) -> None:
        """The first conversation of the request chooses the replica, its first image the variant; without images any
        may answer."""
        self.resolved: list[Resolved] = []  # of `images`, in order; complete once a call is made
        self._answers, self._images, self._caller = answers, images, caller
        self._deadline = time.monotonic() + caller.timeout
        candidates = answers.variants.in_order(images[0].record.digest if images else uuid.uuid4().bytes)
        key = _routing_key(first, caller.tenant.cache_salt)
        super().__init__(candidates, lambda variant: variant.language, key, reconnect_wait=answers.reconnect_wait)

    def generate(
        self,
        turns: Sequence[Turn],
        sampling: language_pb2.SamplingParameters,
        tools: language_pb2.Tools | None,
        template: language_pb2.TemplateOptions | None,
        client: LanguageClient,
        *,
        whole: bool = False,
    ) -> AsyncGenerator[language_pb2.GenerateEvent, None]:
        """One call of Generate; of a `whole` answer no event comes before it has ended."""
        left = self._left()
        request = language_pb2.GenerateRequest(
            request_id=uuid.uuid4().hex,
            messages=_to_messages(turns, self.resolved),
            sampling=sampling,
            timeout=left,
            client=self._caller.client,
            whole=whole,
            cache_salt=self._caller.tenant.cache_salt,
            tools=tools,
            template=template,
        )
        return client.generate(request, timeout=left + GRACE_SECONDS)  # type: ignore[return-value]

    async def score(
        self, questions: Sequence[ChoiceQuestion], client: LanguageClient
    ) -> tuple[list[language_pb2.ItemScores | LookonceError], language_pb2.LanguageReceipt]:
        """One call of Score. Raises a stale reference's error once."""
        left = self._left()
        request = language_pb2.ScoreRequest(
            request_id=uuid.uuid4().hex,
            timeout=left,
            client=self._caller.client,
            cache_salt=self._caller.tenant.cache_salt,
        )
        references = iter(self.resolved)
        for number, question in enumerate(questions):
            messages = _to_messages(question.turns, references)
            request.items.add(
                id=str(number),
                messages=messages,
                choices=question.choices,
                special_tokens=question.special_tokens,
            )
        response = await client.score(request, timeout=left + GRACE_SECONDS)
        outcomes = [
            from_proto(result.error) if result.WhichOneof("outcome") == "error" else result.scores
            for result in response.results
        ]
        if len(outcomes) != len(questions):
            raise LookonceError(ErrorKind.INTERNAL, "the language service answered another number of questions")
        stale = [item for item in outcomes if isinstance(item, LookonceError) and item.kind in STALE]
        if stale and not self.renewed:
            raise stale[0]
        return outcomes, response.receipt

    async def prepare(self) -> None:
        """See Attempts: the embeddings of the variant that answers."""
        self._entered = time.perf_counter()
        library, tenant = self._answers.images, self._caller.tenant

        async def one(part: ImagePart) -> Resolved:
            if part.resolved is not None and part.resolved.variant == self.served.name:
                return part.resolved
            return await library.resolve(part.record, tenant, part.bounds, served=self.served, data=part.data)

        self.resolved[:] = await _each(self._images, one)

    async def renew(self, error: LookonceError) -> bool:
        """See Attempts: encode the images again. Raises `error` when a file is gone, the embedding perhaps not."""
        library, tenant = self._answers.images, self._caller.tenant

        async def one(part: ImagePart) -> Resolved:
            try:
                return await library.renew(part.record, tenant, part.bounds, served=self.served, data=part.data)
            except LookonceError as failure:
                if failure.kind is ErrorKind.NOT_FOUND and error.retry_after is not None:
                    raise error from failure
                raise

        self.resolved[:] = await _each(self._images, one)
        return bool(self._images)

    def left(self, outcome: str) -> None:
        """See Attempts: count the request and its time."""
        VARIANT_REQUESTS.labels(self.served.name, outcome).inc()
        VARIANT_SECONDS.labels(self.served.name).observe(time.perf_counter() - self._entered)

    @contextmanager
    def calling(self, endpoint: Endpoint[LanguageClient]) -> Iterator[LanguageClient]:
        """See Attempts: count callers who wait."""
        self._answers.interactive += not self._caller.background
        try:
            with super().calling(endpoint) as client:
                yield client
        finally:
            self._answers.interactive -= not self._caller.background

    def _left(self) -> float:
        """Seconds to the deadline. Raises DEADLINE_EXCEEDED."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            text = "the deadline passed: --request-timeout of the gateway is the longest"
            raise LookonceError(ErrorKind.DEADLINE_EXCEEDED, text)
        return left


async def collect(events: AsyncIterable[language_pb2.GenerateEvent], n: int) -> list[Completion]:
    """Read all events into n completions, in order of index."""
    completions = [Completion() for _ in range(n)]
    finished: set[int] = set()
    async for event in events:
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
            finished.add(item.index)
    if len(finished) < n:
        raise LookonceError(ErrorKind.UNAVAILABLE, "the language service ended an answer early", retry_after=1.0)
    return completions


async def _each(images: Sequence[ImagePart], call: Callable[[ImagePart], Awaitable[Resolved]]) -> list[Resolved]:
    """`call` for each distinct image and variant, concurrently; results in the order of `images`."""
    if len(images) == 1:
        return [await call(images[0])]
    distinct = {(part.record.digest, part.bounds): part for part in images}
    found = await asyncio.gather(*(call(part) for part in distinct.values()))
    by_key = dict(zip(distinct, found, strict=True))
    return [by_key[part.record.digest, part.bounds] for part in images]


def _images_of(turns: Sequence[Turn]) -> list[ImagePart]:
    """The images of a conversation, in order."""
    return [part for turn in turns for part in turn.parts if isinstance(part, ImagePart)]


def _routing_key(turns: Sequence[Turn], salt: bytes) -> bytes:
    """What decides the replica: the images; without any, the first turn (a shared system prompt) and whose it is."""
    images = _images_of(turns)
    if images:
        return images[0].record.digest
    first = "".join(part for part in turns[0].parts if isinstance(part, str)) if turns else ""
    return hashlib.sha256(salt + first.encode("utf-8", "surrogatepass")).digest()


def _to_messages(turns: Sequence[Turn], resolved: Iterable[Resolved]) -> list[language_pb2.Message]:
    """The wire form; `resolved` gives an embedding for each image, in order (an iterator, those of later turns too)."""
    references = iter(resolved)
    return [
        language_pb2.Message(
            role=turn.role,
            parts=[
                language_pb2.Part(text=part)
                if isinstance(part, str)
                else language_pb2.Part(image=next(references).reference.to_proto())
                for part in turn.parts
            ],
            tool_calls=[
                language_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in turn.calls
            ],
        )
        for turn in turns
    ]


def receipt(resolved: Sequence[Resolved], language: language_pb2.LanguageReceipt, model: str) -> dict[str, Any]:
    """The receipt of one answer. `embedding` is that of the slowest image, null without images."""
    outcomes = [item.outcome for item in resolved]
    fields = {
        "embedding": max(outcomes, key=SLOWNESS.__getitem__, default=None),
        "prefix": "hit" if language.prefix_hit else "miss",
        "encode_ms": _ms(max((item.encode_ms for item in resolved), default=0.0)),
        "prefill_tokens": language.prefill_tokens,
        "cached_tokens": language.cached_tokens,
        "queue_ms": _ms(language.queue_ms),
        "ttft_ms": _ms(language.ttft_ms),
        "model": model,
        "fingerprint": language.fingerprint or (resolved[0].reference.fingerprint if resolved else ""),
    }
    if resolved and resolved[0].variant != DEFAULT:
        fields["variant"] = resolved[0].variant
    told = {name: value for name, value in fields.items() if isinstance(value, str | int | float)}
    tracing.annotate(**told)
    ANSWERS.labels(fields["embedding"] or "none", fields["prefix"]).inc()
    FIRST_TOKEN_SECONDS.observe(language.ttft_ms / 1000)
    return fields


def usage(items: Sequence[language_pb2.Usage]) -> dict[str, Any]:
    """OpenAI's usage object over the n answers to one prompt: the prompt counts once."""
    prompt = max((item.prompt_tokens for item in items), default=0)
    completion = sum(item.completion_tokens for item in items)
    cached = max((item.cached_tokens for item in items), default=0)
    images = max((item.image_tokens for item in items), default=0)
    for kind, count in (("prompt", prompt), ("cached", cached), ("completion", completion)):
        TOKENS.labels(kind).inc(count)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "image_tokens": images},
    }


def finish_reason(reason: language_pb2.FinishReason) -> str:
    """OpenAI's word for why an answer ended."""
    return "length" if reason == language_pb2.LENGTH else "stop"


def _ms(value: float) -> float:
    return round(value, 3)
