"""Score: items to prompts, prompts to the engine, and an error of one item kept to that item."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from lm_service.engine.types import Engine, ScoreItem, Scoring, Timings, by_images
from lm_service.metrics import METRICS, TracePhases
from lm_service.prompt import SHORT, PromptBuilder, PromptThread
from lm_service.wire import Replies, check_items, choices_of, item_scores, messages_of
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.rpc.messages import to_proto
from lookonce.core.tasks import gather_or_end
from protos.lookonce.v1 import language_pb2

_OF_ONE_IMAGE = {ErrorKind.EMBEDDING_MISSING, ErrorKind.EMBEDDING_INVALID, ErrorKind.FINGERPRINT_MISMATCH}
"""Failures that say nothing of items about other images."""
_INLINE_SECONDS = 0.001
"""Preparing items may hold up the event loop for so long: less than a thread needs to take them over."""


@dataclass(frozen=True)
class _Asked:
    """An item that is fit to be scored, and its place among the results."""

    at: int
    choices: tuple[str, ...]
    item: ScoreItem


class Scorer:
    """Answers ScoreRequests."""

    def __init__(
        self,
        engine: Engine,
        builder: PromptBuilder,
        replies: Replies,
        prompt_thread: PromptThread,
    ) -> None:
        """`prompt_thread` builds long prompts."""
        self._engine = engine
        self._builder = builder
        self._prompt_thread = prompt_thread
        self._replies = replies

    async def score(self, request: language_pb2.ScoreRequest, deadline: float) -> language_pb2.ScoreResponse:
        """Results in the order asked. Raises what concerns the whole request (OVERLOADED, DEADLINE_EXCEEDED)."""
        check_items(request.items)
        results = [language_pb2.ScoreResult(id=item.id) for item in request.items]
        asked = await self._asked(request, results)
        name = request.request_id or uuid.uuid4().hex
        timings = Timings()
        try:
            if asked:
                timings = await self._run(asked, results, name, request, deadline)
        except LookonceError as error:
            if error.kind not in _OF_ONE_IMAGE:
                raise
            timings = await self._run_by_image(asked, results, name, request, deadline)
        receipt = self._replies.receipt(timings, [entry.item.prompt for entry in asked])
        return language_pb2.ScoreResponse(results=results, receipt=receipt)

    async def _asked(
        self, request: language_pb2.ScoreRequest, results: Sequence[language_pb2.ScoreResult]
    ) -> list[_Asked]:
        """The items that are fit; the errors of the others go into their results. Long ones are left to a thread."""
        items = request.items
        known: dict[bytes, EmbeddingReference] = {}  # items about one image name it each by itself

        def prepare(places: range) -> list[_Asked | None]:
            return [self._prepare(at, items[at], results[at], known, request.cache_salt) for at in places]

        asked: list[_Asked | None] = []
        until = time.perf_counter() + _INLINE_SECONDS
        while len(asked) < len(items) and self._is_short(items[len(asked)]) and time.perf_counter() < until:
            asked += prepare(range(len(asked), len(asked) + 1))
        if len(asked) < len(items):
            asked += await self._prompt_thread.run(prepare, range(len(asked), len(items)))
        return [entry for entry in asked if entry is not None]

    def _is_short(self, item: language_pb2.ScoreItem) -> bool:
        parts = [part for message in item.messages for part in message.parts]
        size = sum(map(len, item.choices)) + sum(len(part.text) + part.image.tokens for part in parts)
        grids = (part.image.grid for part in parts if part.HasField("image"))
        known = all(self._builder.has_laid_out((grid.t, grid.h, grid.w)) for grid in grids)
        return len(parts) <= 16 and len(item.choices) <= 16 and size <= SHORT and known

    def _prepare(
        self,
        at: int,
        item: language_pb2.ScoreItem,
        result: language_pb2.ScoreResult,
        known: dict[bytes, EmbeddingReference],
        salt: bytes,
    ) -> _Asked | None:
        try:
            choices = choices_of(item)
            tokens = tuple(self._builder.template.choice_ids(choice, salt) for choice in choices)
            messages = messages_of(item.messages, known=known)
            reserve = max(map(len, tokens))
            prompt = self._builder.build(messages, reserve=reserve, salt=salt, special_tokens=item.special_tokens)
        except LookonceError as error:
            result.error.CopyFrom(to_proto(error))
            return None
        return _Asked(at, choices, ScoreItem(prompt, tokens))

    async def _run(
        self,
        asked: Sequence[_Asked],
        results: Sequence[language_pb2.ScoreResult],
        name: str,
        request: language_pb2.ScoreRequest,
        deadline: float,
    ) -> Timings:
        items = tuple(entry.item for entry in asked)
        trace_phases = TracePhases()
        isolated = request.isolated or request.alone  # `alone`: of callers of the last release
        scoring = Scoring(name, items, request.client, deadline, isolated, request.cache_salt)
        scores = await self._engine.score(scoring)
        trace_phases.scored(scores.timings)
        for entry, logprobs, cached in zip(asked, scores.logprobs, scores.cached_tokens, strict=True):
            lengths = [len(choice) for choice in entry.item.choices]
            results[entry.at].scores.CopyFrom(item_scores(entry.choices, lengths, logprobs, entry.item.prompt, cached))
        METRICS.prompt_tokens.inc(sum(len(item.prompt.token_ids) for item in items))
        METRICS.cached_tokens.inc(sum(scores.cached_tokens))
        return scores.timings

    async def _run_by_image(
        self,
        asked: Sequence[_Asked],
        results: Sequence[language_pb2.ScoreResult],
        name: str,
        request: language_pb2.ScoreRequest,
        deadline: float,
    ) -> Timings:
        """Score each image's items on their own: one's trouble is not the others'."""

        async def run(group: Sequence[_Asked]) -> Timings:
            try:
                return await self._run(group, results, name, request, deadline)
            except LookonceError as error:
                if error.kind not in _OF_ONE_IMAGE:
                    raise
                for entry in group:
                    results[entry.at].error.CopyFrom(to_proto(error))
                return Timings()

        groups = [[asked[at] for at in places] for places in by_images([entry.item for entry in asked])]
        total = Timings()
        for timings in await gather_or_end([run(group) for group in groups]):
            _add(total, timings)
        return total


def _add(total: Timings, more: Timings) -> None:
    for name in ("queue_ms", "load_ms", "total_ms", "prefill_tokens", "cached_tokens"):
        setattr(total, name, getattr(total, name) + getattr(more, name))
    total.ttft_ms = total.total_ms
    total.embedding = more.embedding
    total.prefix_hit = total.prefix_hit or more.prefix_hit
