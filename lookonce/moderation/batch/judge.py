"""Judges one image: one encode, all rules scored in one call, a follow-up question for each that fires."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.identity import EmbeddingReference
from lookonce.core.rpc.messages import from_proto
from lookonce.moderation import judging
from lookonce.moderation.batch.outcome import SERVICE_CRASHED, Failure, Outcome, Timings
from lookonce.moderation.batch.poison_isolation import PoisonIsolation, ServiceCrashed, plain_image
from lookonce.moderation.batch.run_identity import Models
from lookonce.moderation.batch.service_pool import (
    LOST,
    Attempts,
    LanguageConnection,
    Patience,
    ServicePool,
    VisionConnection,
)
from lookonce.moderation.policy import Policy, Rule
from protos.lookonce.v1 import common_pb2, language_pb2

_OF_THE_IMAGE = frozenset({
    ErrorKind.IMAGE_INVALID,
    ErrorKind.IMAGE_TOO_LARGE,
    ErrorKind.PAYLOAD_TOO_LARGE,
    ErrorKind.UNSUPPORTED,
    ErrorKind.CONTEXT_LENGTH_EXCEEDED,
})  # fmt: skip


class Judge:
    """Applies one policy with one pair of models. Safe to use from many tasks at once."""

    def __init__(
        self,
        policy: Policy,
        models: Models,
        visions: ServicePool[VisionConnection],
        languages: ServicePool[LanguageConnection],
        patience: Patience,
        isolation: PoisonIsolation,
    ) -> None:
        self._policy = policy
        self._models = models
        self._visions = visions
        self._languages = languages
        self._patience = patience
        self._isolation = isolation
        self._judged_at = 0.0  # the last image, on the monotonic clock
        nothing = common_pb2.ImageReference()
        self._items = {  # by rule, without the image: copying one costs a quarter of making it
            rule.id: language_pb2.ScoreItem(
                id=rule.id, messages=self._messages(nothing, rule.ask("image")), choices=rule.choices
            )
            for rule in policy.of("image")
        }

    async def judge(self, image: bytes) -> tuple[Outcome, Timings]:
        """What comes of the image, and what it took. An image that can't be judged is an outcome, too.

        Raises what ends the run: UNAVAILABLE when a service stays away, FINGERPRINT_MISMATCH when the model has
        changed, and whatever says that the request itself is wrong; and Suspected, where no trials are made."""
        attempts = Attempts(self._patience)
        while True:
            try:
                judged = await self._judge(image, attempts)
            except LookonceError as error:
                if error.kind in _OF_THE_IMAGE:
                    return Outcome(failure=Failure.of(error)), Timings()
                if error.kind not in {ErrorKind.INTERNAL, *LOST}:
                    raise
                if attempts.are_spent(error):
                    self._check_that_others_are_judged(error, attempts.unreachable_since)
                    return Outcome(failure=Failure.of(error)), Timings()
                await attempts.pause(error)
            except ServiceCrashed as error:
                return Outcome(failure=Failure(SERVICE_CRASHED, str(error))), Timings()
            else:
                self._judged_at = time.monotonic()
                return judged

    def _check_that_others_are_judged(self, error: LookonceError, since: float) -> None:
        """Raise UNAVAILABLE when embeddings don't reach the language service: none ever, or none since then."""
        if error.kind in LOST and (self._judged_at == 0.0 or self._judged_at < since < math.inf):
            remedy = "give the language services --vision, or one store to both"
            text = f"no image can be judged, for {error.message}: {remedy}"
            raise LookonceError(ErrorKind.UNAVAILABLE, text) from error

    async def _judge(self, image: bytes, attempts: Attempts) -> tuple[Outcome, Timings]:
        started = time.perf_counter()
        reference, how = await self._isolation.run(self._visions, self._encode, image, plain_image, attempts)
        encoded = time.perf_counter()
        rules = self._policy.of("image", (reference.width, reference.height))
        shown = reference.to_proto()
        scores: dict[str, float] = {}
        if rules:
            score = partial(self._score, rules=rules)
            scores = await self._isolation.run(self._languages, score, shown, self._plain, attempts)
        scored = time.perf_counter()
        follow_ups: dict[str, str] = {}
        for rule in judging.following_up(rules, scores):
            ask = partial(self._follow_up, rule=rule)
            follow_ups[rule.id] = await self._isolation.run(self._languages, ask, shown, self._plain, attempts)
        followed = time.perf_counter()
        timings = Timings(
            encode_ms=_ms(encoded - started),
            score_ms=_ms(scored - encoded) if rules else None,
            follow_up_ms=_ms(followed - scored) if follow_ups else None,
            embedding=how,
        )
        return Outcome(reference.width, reference.height, scores, follow_ups), timings

    async def _plain(self) -> common_pb2.ImageReference:
        """Of a plain image, encoded now."""
        with self._visions.use() as connection:
            reference, _ = await self._encode(connection, await plain_image())
        return reference.to_proto()

    async def _encode(self, connection: VisionConnection, image: bytes) -> tuple[EmbeddingReference, str]:
        most = self._models.max_pixels
        reference, how = await connection.streams.encode(image, max_pixels=most, timeout=self._patience.call)
        if reference.fingerprint != self._models.vision:
            raise other_model("vision service", self._models.vision, reference.fingerprint)
        return reference, how

    async def _score(
        self, connection: LanguageConnection, shown: common_pb2.ImageReference, rules: Sequence[Rule]
    ) -> dict[str, float]:
        items = [self._item(shown, rule) for rule in rules]
        return judging.scores(rules, map(_logprobs, await connection.calls.score(items)))

    def _item(self, shown: common_pb2.ImageReference, rule: Rule) -> language_pb2.ScoreItem:
        item = language_pb2.ScoreItem()
        item.CopyFrom(self._items[rule.id])
        item.messages[-1].parts[0].image.CopyFrom(shown)
        return item

    async def _follow_up(self, connection: LanguageConnection, shown: common_pb2.ImageReference, rule: Rule) -> str:
        timeout = self._patience.call
        request = language_pb2.GenerateRequest(
            messages=self._messages(shown, rule.ask_further("image")),
            sampling=language_pb2.SamplingParameters(max_tokens=rule.follow_up_tokens),
            timeout=timeout,
            whole=True,
        )
        text, finished = "", False
        async with connection.slots:
            async for event in connection.client.generate(request, timeout=timeout + 1):
                text += event.delta.text
                finished = finished or event.WhichOneof("event") == "finish"
        if not finished:
            raise LookonceError(ErrorKind.UNAVAILABLE, "the language service ended an answer early")
        return judging.follow_up_text(text)

    def _messages(self, shown: common_pb2.ImageReference, question: str) -> list[language_pb2.Message]:
        """The image first: all rules share its computation."""
        asked = language_pb2.Message(
            role="user", parts=[language_pb2.Part(image=shown), language_pb2.Part(text=question)]
        )
        if not self._policy.system:
            return [asked]
        return [language_pb2.Message(role="system", parts=[language_pb2.Part(text=self._policy.system)]), asked]


def _logprobs(result: language_pb2.ScoreResult) -> dict[str, float]:
    if result.WhichOneof("outcome") == "error":
        raise from_proto(result.error)
    return {choice.choice: choice.logprob for choice in result.scores.choices}


def other_model(service: str, wanted: str, found: str) -> LookonceError:
    """The run can't go on with another model."""
    text = f"the {service} has another model than the run began with: {found[:12]} instead of {wanted[:12]}"
    return LookonceError(ErrorKind.FINGERPRINT_MISMATCH, text)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
