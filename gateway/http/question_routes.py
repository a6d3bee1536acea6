"""/v1/images/{id}/questions: many questions on one image in one call."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.conversation import Caller, ImagePart, Turn
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
from gateway.schemas.requests import Parameters, Question, QuestionsRequest, Scale
from gateway.schemas.responses import Answer, Answers
from gateway.schemas.structure import StructureFields, one_of, structure_of, wire
from gateway.settings import GatewaySettings
from gateway.typed_questions import MAX_ORDERS, MAX_PROMPTS, Asking, ClosedQuestion
from lookonce.core.errors import LookonceError, invalid
from protos.lookonce.v1 import language_pb2

router = APIRouter(tags=["images"], route_class=Route)
_FORMS = tuple(StructureFields.model_fields)
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
    questions = [_question(position, item, body, image) for position, item in enumerate(body.questions)]
    prompts = sum(len(question.items) for question in questions if isinstance(question, ClosedQuestion))
    if prompts > MAX_PROMPTS:
        text = (
            f"the questions are {prompts} prompts, one for each label and order; the limit is {MAX_PROMPTS}: ask fewer"
        )
        raise invalid(text, param="questions")
    return questions


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


def _chars(item: Question) -> int:
    """Of all its prompts."""
    options = [*(item.choices or ()), *(item.scale if isinstance(item.scale, list) else ())]
    asked = len(item.labels or (None,)) if not item.debias else min(MAX_ORDERS, max(2, len(options)))
    return asked * (len(item.text) + sum(map(len, options))) + sum(map(len, item.labels or ()))


def _check(body: QuestionsRequest, settings: GatewaySettings) -> None:
    if len(body.questions) > settings.max_questions:
        raise invalid(
            f"'questions' has {len(body.questions)} items, the limit is {settings.max_questions}", param="questions"
        )
    chars = len(body.system or "") * len(body.questions)  # each is asked with it
    for position, item in enumerate(body.questions):
        chars += len(item) if isinstance(item, str) else _chars(item)
        if isinstance(item, Question):
            _check_type(item, f"questions.{position}", settings.max_choices)
    if chars > settings.max_text_chars:
        raise invalid(
            f"the questions, each with 'system', have {chars} characters, the limit is {settings.max_text_chars}: "
            "ask fewer at once, or shorten them",
            param="questions",
        )
    given = [item.id for item in body.questions if isinstance(item, Question) and item.id is not None]
    if len(set(given)) != len(given):
        raise invalid("the ids of the questions must differ", param="questions")


_NEEDS = {"choice": "choices", "rating": "scale", "many_of": "labels", "extract": "schema"}
"""What a question of a type is asked with."""


def _check_type(item: Question, param: str, limit: int) -> None:
    """Raise unless a question is of one type."""
    form = {
        "choices": item.choices,
        "scale": item.scale,
        "labels": item.labels,
        "schema": item.schema_,
        "regex": item.regex,
    }
    given = [name for name, value in form.items() if value is not None]
    if len(given) > 1:
        text = f"'{param}' has '{given[0]}' and '{given[1]}': it can be answered in one of these ways"
        raise invalid(text, param=f"{param}.{given[1]}")
    kind = _kind(item)
    needed = _NEEDS.get(kind)
    if needed is not None and form[needed] is None:
        raise invalid(f"'{param}.{needed}' is required for a question of type '{kind}'", param=f"{param}.{needed}")
    if given and needed != given[0] and not (kind in ("text", "extract") and given[0] in ("schema", "regex")):
        field = f"{param}.{given[0]}"
        raise invalid(f"'{field}' does not belong to a question of type '{kind}'", param=field)
    for name in ("choices", "labels", "scale"):
        if isinstance(options := form[name], list):
            _check_options(options, f"{param}.{name}", limit)
    for name in ("tell_options", "debias"):
        if getattr(item, name) is not None and kind not in ("choice", "yes_no", "rating"):
            raise invalid(f"'{param}.{name}' has no meaning for a question of type '{kind}'", param=f"{param}.{name}")


def _check_options(options: Sequence[str], param: str, limit: int) -> None:
    if len(options) > limit:
        raise invalid(f"'{param}' has {len(options)} items, the limit is {limit}", param=param)
    if len(set(options)) != len(options):
        raise invalid(f"'{param}' must not repeat an item", param=param)


def _kind(item: Question) -> str:
    if item.type is not None:
        return item.type
    form = {"choice": item.choices, "rating": item.scale, "many_of": item.labels}
    return next((kind for kind, value in form.items() if value is not None), "text")


def _question(position: int, item: str | Question, body: QuestionsRequest, image: ImagePart) -> AnyQuestion:
    system = (Turn("system", (body.system,)),) if body.system else ()

    def prompt(text: str) -> tuple[Turn, ...]:
        return (*system, Turn("user", (image, text)))

    if isinstance(item, str):
        return OpenQuestion(str(position), prompt(item), _sampling(body, body, _form_of(body)))
    name = item.id if item.id is not None else str(position)
    kind = _kind(item)
    if kind in ("text", "extract"):
        sampling = _sampling(item, body, _structure(position, item) or _form_of(body))
        return OpenQuestion(name, prompt(item.text), sampling, is_json=item.schema_ is not None)
    asking = Asking(prompt, special_tokens=special_tokens(item, body))
    tell = item.tell_options
    if kind == "many_of":
        return asking.many_of(name, item.text, item.labels or [])
    if kind == "yes_no":
        return asking.yes_no(name, item.text, tell=bool(tell), orders=2 if item.debias else 1)
    if kind == "rating":
        return asking.rating(
            name, item.text, _levels(item.scale), tell=tell is not False, orders=2 if item.debias else 1
        )
    orders = MAX_ORDERS if item.debias else 1
    return asking.choice(name, item.text, item.choices or [], tell=bool(tell), orders=orders)


def _levels(scale: Scale | None) -> list[tuple[str, float]]:
    if isinstance(scale, list):
        return [(label, float(place)) for place, label in enumerate(scale, 1)]
    numbers = range(scale.min, scale.max + 1) if scale is not None else range(0)
    return [(str(number), float(number)) for number in numbers]


def _form_of(body: QuestionsRequest) -> language_pb2.Structure | None:
    """The form that the request gives all answers."""
    return structure_of(body) if any(getattr(body, name) is not None for name in _FORMS) else None


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
