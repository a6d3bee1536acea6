"""Many questions on one image: asked concurrently, those with choices in one call, each with its own outcome."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from gateway.answers import Answers, finish_reason, receipt, usage
from gateway.conversation import Caller, ChoiceQuestion, Turn
from gateway.routing.retries import LATER, Together
from gateway.routing.variants import ServedModel
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.tasks import end_tasks, start_task
from protos.lookonce.v1 import language_pb2

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class OpenQuestion:
    """A question answered in words."""

    id: str
    turns: tuple[Turn, ...]
    sampling: language_pb2.SamplingParameters


AnyQuestion = OpenQuestion | ChoiceQuestion


@dataclass(frozen=True)
class Outcome:
    """What became of question number `position`: fields of its answer, or an error."""

    position: int
    id: str
    fields: dict[str, Any] | None = None
    error: LookonceError | None = None


class Questions:
    """Runs the questions of one request."""

    def __init__(self, answers: Answers, model: ServedModel, *, concurrency: int) -> None:
        self._answers = answers
        self._model = model
        self._concurrency = concurrency

    async def run(self, questions: Sequence[AnyQuestion], caller: Caller) -> AsyncGenerator[Outcome, None]:
        """Outcomes in order of completion. Closing the iterator stops all work."""
        gate, together = asyncio.Semaphore(self._concurrency), Together()
        answer_open = partial(self._answer_open, caller, gate, together)
        tasks = [
            start_task(_outcomes([(position, question)], partial(answer_open, position, question)))
            for position, question in enumerate(questions)
            if isinstance(question, OpenQuestion)
        ]
        choices = [(position, item) for position, item in enumerate(questions) if isinstance(item, ChoiceQuestion)]
        if choices:
            tasks.append(start_task(_outcomes(choices, partial(self._answer_choices, choices, caller))))
        try:
            for done in asyncio.as_completed(tasks):
                for outcome in await done:
                    yield outcome
        finally:
            await end_tasks(*tasks)

    async def run_all(self, questions: Sequence[AnyQuestion], caller: Caller) -> list[Outcome]:
        """Outcomes in the order asked. Raises the failure when all failed for want of a service: ask again later."""
        outcomes: list[Outcome] = []
        async with aclosing(self.run(questions, caller)) as run:
            async for outcome in run:
                outcomes.append(outcome)  # noqa: PERF401
        outcomes.sort(key=lambda outcome: outcome.position)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if len(errors) == len(outcomes) and all(error.kind in LATER for error in errors):
            raise errors[0]
        return outcomes

    async def _answer_open(
        self, caller: Caller, gate: asyncio.Semaphore, together: Together, position: int, question: OpenQuestion
    ) -> list[Outcome]:
        async with gate:
            call = partial(self._answers.complete, question.turns, question.sampling, caller)
            (completion,), resolved = await together.run(call)
        fields = {
            "text": completion.text,
            "finish_reason": finish_reason(completion.finish.reason),
            "usage": usage([completion.finish.usage]),
            "receipt": receipt(resolved, completion.finish.receipt, self._model.name),
        }
        return [Outcome(position, question.id, fields)]

    async def _answer_choices(self, items: list[tuple[int, ChoiceQuestion]], caller: Caller) -> list[Outcome]:
        scores, cost, resolved = await self._answers.score([item for _, item in items], caller)
        bill = receipt(resolved, cost, self._model.name)
        return [
            Outcome(position, item.id, error=found)
            if isinstance(found, LookonceError)
            else Outcome(position, item.id, _choice_fields(found) | {"receipt": bill})
            for (position, item), found in zip(items, scores, strict=True)
        ]


async def _outcomes(
    items: Sequence[tuple[int, AnyQuestion]], ask: Callable[[], Awaitable[list[Outcome]]]
) -> list[Outcome]:
    """What comes of questions that are asked together: outcomes in any case, so that whoever reads them is told."""
    try:
        return await ask()
    except LookonceError as error:
        failure = error
    except Exception:  # the edge of one question: nothing foreign may leak, the others go on
        log.exception("a question failed", questions=len(items))
        failure = LookonceError(ErrorKind.INTERNAL, "internal error")
    return [Outcome(position, item.id, error=failure) for position, item in items]


def _choice_fields(scores: language_pb2.ItemScores) -> dict[str, Any]:
    best = max(scores.choices, key=lambda item: item.probability, default=None)
    return {
        "text": best.choice if best is not None else "",
        "choices": {item.choice: item.probability for item in scores.choices},
        "logprobs": {item.choice: item.logprob for item in scores.choices},
        "finish_reason": "stop",
        "usage": usage([scores.usage]),
    }
