"""/v1/systemone: typed questions about a state of texts and images, in another API's words, over the same scores."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from gateway.conversation import ImagePart, Turn
from gateway.core import Gateway
from gateway.http.openapi import reference
from gateway.http.request_images import check_size, decode, decoded_size
from gateway.http.route import Route, caller_of, gateway_of, json_response, read_json, until_disconnect, validate
from gateway.json_text import parse_json
from gateway.questions import Outcome, Questions
from gateway.schemas import systemone as schemas
from gateway.typed_questions import Asking, ClosedQuestion
from lookonce.core.errors import LookonceError, invalid

router = APIRouter(tags=["questions"], route_class=Route)
_REQUEST = "request"  # the form's part that holds the JSON
Parts = tuple[str | ImagePart, ...]


@router.post(
    "/v1/systemone",
    summary="Answer typed questions about a state",
    response_model=schemas.SystemOneResponse,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": reference(schemas.SystemOneRequest)}},
        }
    },
)
async def answer_system_one(request: Request) -> Response:
    """Answer typed questions about texts and images, all in one pass behind what they have in common. Images come as
    base64 in the JSON, or as parts of a form whose part `request` is the JSON."""
    return json_response(await until_disconnect(request, _answered(request)))


async def _answered(request: Request) -> dict[str, Any]:
    gateway, caller = gateway_of(request), caller_of(request)
    body, files = await _read(request)
    images = await _images(body, files, request)
    state = _split(body.state, images)
    named = {name for name in images if any(name in text for text in _texts(body))}
    loose = tuple(image for name, image in images.items() if name not in named)

    def prompt(text: str) -> tuple[Turn, ...]:
        return (Turn("user", (*loose, *state, "\n\n", *_split(text, images))),)

    asking = Asking(prompt)
    chars = sum(len(text) for text in _texts(body))
    if chars > gateway.settings.max_text_chars:
        limit = gateway.settings.max_text_chars
        raise invalid(f"the state and the questions have {chars} characters, the limit is {limit}", param="state")
    questions = [_question(asking, name, question) for name, question in body.questions.items()]
    runner = Questions(gateway.answers, gateway.model, concurrency=1)
    outcomes = await runner.run_all(questions, caller)
    return _response(body, outcomes, gateway)


async def _read(request: Request) -> tuple[schemas.SystemOneRequest, dict[str, bytes]]:
    """The body, and the files of a form by their parts."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await read_json(request, schemas.SystemOneRequest), {}
    settings = gateway_of(request).settings
    most = settings.json_limits.text_bytes
    async with request.form(max_files=settings.max_images, max_fields=1, max_part_size=most) as form:
        text = form.get(_REQUEST)
        raw = await text.read() if isinstance(text, UploadFile) else (text or "").encode()
        if not raw:
            raise invalid(f"'{_REQUEST}' is required: the part that holds the JSON", param=_REQUEST)
        body = validate(parse_json(bytearray(raw), settings.json_limits).value, schemas.SystemOneRequest)
        files = {}
        for name, part in form.multi_items():
            if isinstance(part, UploadFile) and name != _REQUEST:
                check_size(part.size or 0, settings.max_image_bytes, name)
                files[name] = await part.read()
        return body, files


async def _images(body: schemas.SystemOneRequest, files: Mapping[str, bytes], request: Request) -> dict[str, ImagePart]:
    """The images by the names that stand for them, kept and encoded."""
    gateway, tenant = gateway_of(request), caller_of(request).tenant
    assets = body.assets or {}
    if len(assets) > gateway.settings.max_images:
        text = f"the request has {len(assets)} images, the limit is {gateway.settings.max_images}"
        raise invalid(text, param="assets")

    async def one(name: str, asset: schemas.Asset) -> ImagePart:
        param = f"assets.{name}"
        if asset.part is not None:
            if asset.part not in files:
                raise invalid(f"'{param}.part' names no part of the form", param=f"{param}.part")
            data = files[asset.part]
        elif asset.data_base64 is not None:
            check_size(decoded_size(asset.data_base64), gateway.settings.max_image_bytes, param)
            data = await decode(asset.data_base64, f"{param}.data_base64")
        else:
            raise invalid(f"'{param}' needs 'data_base64', or in a form 'part'", param=param)
        try:
            record, resolved = await gateway.images.add(data, tenant)
        except LookonceError as error:
            raise LookonceError(error.kind, error.message, param=param, retry_after=error.retry_after) from error
        return ImagePart(record, resolved=resolved, data=data)

    found = await asyncio.gather(*(one(name, asset) for name, asset in assets.items()))
    return dict(zip(assets, found, strict=True))


def _split(content: Any, images: Mapping[str, ImagePart]) -> Parts:
    """A content's text, its images where their names stand."""
    text = _text(content)
    if not images:
        return (text,) if text else ()
    names = "|".join(map(re.escape, sorted(images, key=len, reverse=True)))
    pieces = re.split(f"({names})", text)
    return tuple(images.get(piece, piece) for piece in pieces if piece)


def _text(content: Any) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else orjson.dumps(content).decode()


def _texts(body: schemas.SystemOneRequest) -> list[str]:
    """All that can name an image."""
    found = [_text(body.state)]
    for question in body.questions.values():
        found.append(_text(question.instructions))
        if isinstance(question, schemas.ChoiceQuestion):
            found += [*question.criteria, *map(_text, question.criteria.values())]
        elif isinstance(question, schemas.ScoreQuestion):
            found += map(_text, question.criteria)
        elif question.criteria is not None:
            found += [_text(question.criteria.true), _text(question.criteria.false)]
    return found


def _question(asking: Asking, name: str, question: schemas.AnyQuestion) -> ClosedQuestion:
    lines = [_text(question.instructions) or name]
    if isinstance(question, schemas.NoulQuestion):
        if question.criteria is not None:
            told = {"Yes": question.criteria.true, "No": question.criteria.false}
            lines += [f"{word}: {_text(meaning)}" for word, meaning in told.items() if meaning is not None]
        return asking.yes_no(name, "\n".join(lines), tell=True)
    if isinstance(question, schemas.ScoreQuestion):
        lines += [f"{level}: {_text(meaning)}" for level, meaning in enumerate(question.criteria)]
        levels = [(str(level), float(level)) for level in range(len(question.criteria))]
        return asking.rating(name, "\n".join(lines), levels, tell=True)
    lines += [f"{option}: {_text(meaning)}" for option, meaning in question.criteria.items() if meaning is not None]
    return asking.choice(name, "\n".join(lines), list(question.criteria), tell=True)


def _response(body: schemas.SystemOneRequest, outcomes: Sequence[Outcome], gateway: Gateway) -> dict[str, Any]:
    """Raises the first question's error, naming it."""
    answers, tokens, bill = {}, 0, None
    with_logits = body.options is not None and bool(body.options.return_logits)
    for outcome in outcomes:
        if outcome.error is not None:
            error = outcome.error
            param = f"questions.{outcome.id}"
            raise LookonceError(error.kind, error.message, param=param, retry_after=error.retry_after)
        fields = outcome.fields or {}
        answers[outcome.id] = _answer(body.questions[outcome.id], fields, with_logits=with_logits)
        tokens, bill = tokens + fields["usage"]["prompt_tokens"], fields["receipt"]
    usage = {"input_tokens": tokens, "output_tokens": 0}
    return {"model": gateway.model.name, "answers": answers, "usage": usage, "receipt": bill}


def _answer(question: schemas.AnyQuestion, fields: dict[str, Any], *, with_logits: bool) -> dict[str, Any]:
    if isinstance(question, schemas.NoulQuestion):
        return {"type": "noul", "noul": fields["probability"]}
    shares = fields["choices"]
    told = {"confidence": max(shares.values()), "probabilities": shares}
    if isinstance(question, schemas.ScoreQuestion):
        legend = {str(level): meaning for level, meaning in enumerate(question.criteria)}
        return {"type": "score", "score": fields["value"], **told, "legend": legend}
    logits = {"logits": fields["logprobs"]} if with_logits else {}
    return {"type": "choice", "choice": fields["text"], **told, **logits}
