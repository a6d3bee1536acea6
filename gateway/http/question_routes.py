"""/v1/images/{id}/questions: many questions on one image in one call."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.conversation import Caller, ChoiceQuestion, ImagePart, Turn
from gateway.core import Gateway
from gateway.http import examples
from gateway.http.error_bodies import error_body
from gateway.http.event_stream import EventStream
from gateway.http.openapi import or_events
from gateway.http.request_images import asked_bounds, detail_bounds
from gateway.http.route import Route, caller_of, gateway_of, json_response, until_disconnect
from gateway.images.image_records import ImageRecord
from gateway.questions import AnyQuestion, OpenQuestion, Outcome, Questions
from gateway.schemas.body import PixelFields, special_tokens, stop_list, to_sampling
from gateway.schemas.requests import Parameters, Question, QuestionsRequest
from gateway.schemas.responses import Answer, Answers
from gateway.schemas.structure import one_of, structure_of, wire
from gateway.settings import GatewaySettings
from lookonce.core.errors import LookonceError, invalid
from protos.lookonce.v1 import language_pb2

router = APIRouter(tags=["images"], route_class=Route)
_BOUNDED_BY = ("detail", "mm_processor_kwargs", *PixelFields.model_fields)
"""Fields of a request that ask for other pixel bounds than the service's own."""


@router.post(
    "/v1/images/{image_id}/questions",
    summary="Ask questions about an image",
    response_model=Answers,
    responses=or_events(Answer, examples.ANSWER, examples.CHOSEN),
)
async def ask_questions(request: Request, image_id: str, body: QuestionsRequest) -> Response:
    """Ask all questions concurrently: one JSON in the order asked, or events in order of completion."""
    gateway, caller = gateway_of(request), caller_of(request)
    record = await gateway.images.get(image_id, caller.tenant)
    if not body.stream:
        return json_response(await until_disconnect(request, answer_all(record, body, gateway, caller)))
    questions = await _questions(record, body, gateway)
    return EventStream(_events(_runner(gateway), questions, caller), heartbeat=gateway.settings.heartbeat)


async def answer_all(record: ImageRecord, body: QuestionsRequest, gateway: Gateway, caller: Caller) -> dict[str, Any]:
    """All answers as one object, in the order asked. Raises what is wrong with the request, naming the field."""
    outcomes = await _runner(gateway).run_all(await _questions(record, body, gateway), caller)
    answers = [answer_object(outcome) for outcome in outcomes]
    return {"object": "list", "image": record.id, "model": gateway.model.name, "answers": answers}


def _runner(gateway: Gateway) -> Questions:
    return Questions(gateway.answers, gateway.model, concurrency=gateway.settings.question_concurrency)


async def _questions(record: ImageRecord, body: QuestionsRequest, gateway: Gateway) -> list[AnyQuestion]:
    _check(body, gateway.settings)
    await gateway.model.check(None)
    image = ImagePart(record)
    if any(getattr(body, name) is not None for name in _BOUNDED_BY):
        bounds = detail_bounds(body.detail, gateway.settings).joined(asked_bounds(body))
        image = ImagePart(record, bounds.joined(asked_bounds(body.mm_processor_kwargs, "mm_processor_kwargs.")))
        await gateway.images.check_bounds(record, image.bounds)
    return [_question(position, item, body, image) for position, item in enumerate(body.questions)]


def answer_object(outcome: Outcome) -> dict[str, Any]:
    """One answer as the API shows it."""
    if outcome.error is not None:
        return {"id": outcome.id, "error": error_body(_of_question(outcome.error, outcome.position))["error"]}
    return {"id": outcome.id, **(outcome.fields or {})}


def _of_question(error: LookonceError, position: int) -> LookonceError:
    """The same, naming the question where the language service names the conversation it became."""
    param = {"messages": f"questions.{position}", "choices": f"questions.{position}.choices"}.get(error.param or "")
    if param is None:
        return error
    return LookonceError(error.kind, error.message, param=param, retry_after=error.retry_after)


async def _events(
    runner: Questions, questions: Sequence[AnyQuestion], caller: Caller
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(runner.run(questions, caller)) as outcomes:
        async for outcome in outcomes:
            yield answer_object(outcome)


def _check(body: QuestionsRequest, settings: GatewaySettings) -> None:
    if len(body.questions) > settings.max_questions:
        raise invalid(
            f"'questions' has {len(body.questions)} items, the limit is {settings.max_questions}", param="questions"
        )
    chars = len(body.system or "") * len(body.questions)  # each is asked with it
    for position, item in enumerate(body.questions):
        chars += len(item) if isinstance(item, str) else len(item.text) + sum(map(len, item.choices or ()))
        if isinstance(item, Question) and item.choices is not None:
            if item.schema_ is not None or item.regex is not None:
                text = "has 'choices', so that no text is written: leave out 'schema' and 'regex'"
                raise invalid(f"'questions.{position}' {text}", param=f"questions.{position}")
            _check_choices(item.choices, f"questions.{position}.choices", settings.max_choices)
    if chars > settings.max_text_chars:
        raise invalid(
            f"the questions, each with 'system', have {chars} characters, the limit is {settings.max_text_chars}: "
            "ask fewer at once, or shorten them",
            param="questions",
        )
    given = [item.id for item in body.questions if isinstance(item, Question) and item.id is not None]
    if len(set(given)) != len(given):
        raise invalid("the ids of the questions must differ", param="questions")


def _check_choices(choices: Sequence[str], param: str, limit: int) -> None:
    if len(choices) > limit:
        raise invalid(f"'{param}' has {len(choices)} items, the limit is {limit}", param=param)
    if len(set(choices)) != len(choices):
        raise invalid(f"'{param}' must not repeat a choice", param=param)


def _question(position: int, item: str | Question, body: QuestionsRequest, image: ImagePart) -> AnyQuestion:
    text = item if isinstance(item, str) else item.text
    system = (Turn("system", (body.system,)),) if body.system else ()
    turns = (*system, Turn("user", (image, text)))
    if isinstance(item, str):
        return OpenQuestion(str(position), turns, _sampling(body, body, structure_of(body)))
    identifier = item.id if item.id is not None else str(position)
    if item.choices is not None:
        return ChoiceQuestion(identifier, turns, tuple(item.choices), special_tokens(item, body))
    return OpenQuestion(identifier, turns, _sampling(item, body, _structure(position, item) or structure_of(body)))


def _structure(position: int, item: Question) -> language_pb2.Structure | None:
    field, found = f"questions.{position}", []
    if item.schema_ is not None:
        found.append(wire(f"{field}.schema", json=item.schema_))
    if item.regex is not None:
        found.append(wire(f"{field}.regex", regex=item.regex))
    return one_of(found)


def _sampling(own: Parameters, defaults: Parameters, structure: language_pb2.Structure | None) -> Any:
    return to_sampling(
        own,
        max_tokens=own.max_tokens or defaults.max_tokens,
        stop=stop_list(own.stop if own.stop is not None else defaults.stop),
        defaults=defaults,
        structure=structure,
    )
