"""Many questions on one image: asked concurrently, those of closed types in one call, each with its own outcome."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
import structlog

from gateway.answers import Answers, Completion, finish_reason, receipt, usage
from gateway.conversation import Caller, Turn
from gateway.routing.retries import LATER, Together
from gateway.routing.variants import ServedModel
from gateway.typed_questions import ClosedQuestion
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
    is_json: bool = False  # and its value is told beside the text


AnyQuestion = OpenQuestion | ClosedQuestion


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
        closed = [(position, item) for position, item in enumerate(questions) if isinstance(item, ClosedQuestion)]
        if closed:
            tasks.append(start_task(_outcomes(closed, partial(self._answer_closed, closed, caller))))
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
        value = {"type": "extract", "value": _parsed(completion)} if question.is_json else {}
        fields = {
            "text": completion.text,
            **value,
            "finish_reason": finish_reason(completion.finish.reason),
            "usage": usage([completion.finish.usage]),
            "receipt": receipt(resolved, completion.finish.receipt, self._model.name),
        }
        return [Outcome(position, question.id, fields)]

    async def _answer_closed(self, questions: list[tuple[int, ClosedQuestion]], caller: Caller) -> list[Outcome]:
        """All in one call: what their prompts have in common is computed once."""
        items = [item for _, question in questions for item in question.items]
        scores, cost, resolved = await self._answers.score(items, caller)
        if len(scores) != len(items):
            raise ValueError(f"{len(scores)} scores for {len(items)} prompts")
        bill = receipt(resolved, cost, self._model.name)
        outcomes, each = [], iter(scores)
        for position, question in questions:
            own = [next(each) for _ in question.items]
            failed = next((one for one in own if isinstance(one, LookonceError)), None)
            found = [one for one in own if not isinstance(one, LookonceError)]
            fields = None if failed is not None else question.fields(found) | {"receipt": bill}
            outcomes.append(Outcome(position, question.id, fields, failed))
        return outcomes


def _parsed(completion: Completion) -> Any:
    """The value of an answer in JSON; null of one that its length cut."""
    try:
        return orjson.loads(completion.text)
    except orjson.JSONDecodeError:
        return None


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
