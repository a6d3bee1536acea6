"""The OpenAPI document. Bodies are read and written by our own code, so schemas, errors and examples are added here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.http.error_bodies import HttpRefusal, error_body
from gateway.schemas.responses import ErrorBody
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.version import __version__

TITLE = "lookonce"
DESCRIPTION = "Look at a picture once, ask many questions about it. OpenAI's API, and images as a resource."
TAGS = [
    {"name": "images", "description": "Pictures: uploaded once, encoded once, asked about often, erased everywhere."},
    {"name": "chat", "description": "OpenAI's chat completions."},
    {"name": "moderations", "description": "OpenAI's moderations, by the categories of the operator's policy."},
    {"name": "files", "description": "OpenAI's files: what batches read and write."},
    {"name": "batches", "description": "OpenAI's batches: many requests, answered in the background."},
    {"name": "models", "description": "What is served."},
    {"name": "operation", "description": "For those who run it."},
]
_TEMPLATE = "#/components/schemas/{model}"
_OPEN = frozenset({"/healthz", "/readyz", "/health"})
_ERRORS: dict[int, LookonceError] = {
    400: LookonceError(ErrorKind.INVALID_ARGUMENT, "'temperature' must be at most 2.0", param="temperature"),
    401: LookonceError(ErrorKind.UNAUTHENTICATED, "the API key is not valid"),
    403: LookonceError(ErrorKind.PERMISSION_DENIED, "this key may not do that"),
    404: LookonceError(ErrorKind.NOT_FOUND, "no such image", param="image"),
    409: LookonceError(ErrorKind.CONFLICT, "that is already under way"),
    413: LookonceError(ErrorKind.PAYLOAD_TOO_LARGE, "the request body is larger than 67108864 bytes"),
    415: HttpRefusal(415, "unsupported_media_type", "send JSON with the header 'content-type: application/json'"),
    429: LookonceError(ErrorKind.RATE_LIMITED, "more than 60 requests a minute with this API key"),
    500: LookonceError(ErrorKind.INTERNAL, "internal error"),
    503: LookonceError(ErrorKind.UNAVAILABLE, "no language service can be reached"),
    504: LookonceError(ErrorKind.DEADLINE_EXCEEDED, "the deadline passed"),
}
_RETRY_AFTER = {"retry-after": {"description": "seconds to wait", "required": True, "schema": {"type": "string"}}}
_documented: list[type[BaseModel]] = [ErrorBody]
_described: dict[str, dict[str, Any]] = {}  # operations by their id


def json_body(model: type[BaseModel], examples: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route that takes `model` as JSON; `examples` are bodies by what they show."""
    content = {"schema": reference(model)} | _examples(examples)
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def upload_body(
    model: type[BaseModel], fields: Mapping[str, Any], examples: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`openapi_extra` of a route that takes a file with these form fields, or `model` as JSON."""
    form = {
        "type": "object",
        "properties": {"file": {"type": "string", "format": "binary"}, **fields},
        "required": ["file"],
        "additionalProperties": False,
    }
    extra = json_body(model, examples)
    extra["requestBody"]["content"]["multipart/form-data"] = {"schema": form}
    return extra


def answers(
    model: type[BaseModel],
    example: Any,
    *,
    event: type[BaseModel] | None = None,
    events: str = "",
    statuses: Sequence[int] = (200,),
) -> dict[str, Any]:
    """`openapi_extra` of a route that answers `model`; or server-sent events, each an `event`, of which `events` is an
    example."""
    content: dict[str, Any] = {"application/json": {"schema": reference(model), "example": example}}
    if event is not None:
        text = f"Server-sent events, each the JSON of a {event.__name__}; the last is `data: [DONE]`."
        # No type: some readers hold the schema against the whole text, others against each event taken apart.
        stream = {"description": text, "x-event": reference(event)}
        content["text/event-stream"] = {"schema": stream, "example": events}
    return {"responses": {str(status): {"description": _phrase(status), "content": content} for status in statuses}}


def answers_text(media_type: str, example: str) -> dict[str, Any]:
    """`openapi_extra` of a route that answers text."""
    content = {media_type: {"schema": {"type": "string"}, "example": example}}
    return {"responses": {"200": {"description": _phrase(200), "content": content}}}


def query(name: str, description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter in the query, for `parameters` of `operation`."""
    return {"name": name, "in": "query", "required": False, "description": description, "schema": dict(schema)}


def operation(
    identifier: str,
    summary: str,
    *parts: Mapping[str, Any],
    parameters: Sequence[Mapping[str, Any]] = (),
    errors: Sequence[int] = (),
) -> dict[str, Any]:
    """`openapi_extra` of a route, from its parts (`json_body`, `answers`, ...); `errors` are statuses beyond those that
    follow from its parameters and body."""
    extra: dict[str, Any] = {"operationId": identifier, "summary": summary, "responses": {}}
    for part in parts:
        responses = extra["responses"] | part.get("responses", {})
        extra |= part
        extra["responses"] = responses
    extra["responses"] |= {str(status): _error_reference(status) for status in errors}
    if parameters:
        extra["parameters"] = list(parameters)
    _described[identifier] = deepcopy(extra)
    return extra


def reference(model: type[BaseModel]) -> dict[str, str]:
    """A reference to the schema of `model`, which is put into the document."""
    if model not in _documented:
        _documented.append(model)
    return {"$ref": _TEMPLATE.format(model=model.__name__)}


def install(app: FastAPI, *, with_keys: bool) -> None:
    """Make `app` answer /openapi.json with the complete document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, with_keys=with_keys)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, *, with_keys: bool) -> dict[str, Any]:
    schema = get_openapi(title=TITLE, version=__version__, description=DESCRIPTION, routes=app.routes, tags=TAGS)
    _, definitions = models_json_schema([(model, "validation") for model in _documented], ref_template=_TEMPLATE)
    components = schema.setdefault("components", {})
    components["schemas"] = dict(sorted(definitions.get("$defs", {}).items()))
    components["responses"] = {_name(status): _error_response(status) for status in _ERRORS}
    for path, operations in schema["paths"].items():
        for item in operations.values():
            _restore_examples(item, _described.get(item["operationId"], {}))
            _complete(path, item, with_keys=with_keys)
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema


def _restore_examples(item: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """The framework drops nulls from examples; put these back as they were given."""
    pairs = [(item.get("requestBody", {}), extra.get("requestBody", {}))]
    pairs += [(item["responses"][status], answer) for status, answer in extra.get("responses", {}).items()]
    for there, given in pairs:
        for kind, body in given.get("content", {}).items():
            there["content"][kind] |= {name: body[name] for name in ("example", "examples") if name in body}


def _complete(path: str, item: dict[str, Any], *, with_keys: bool) -> None:
    """Take out what the framework would answer, put in the errors that any route of this kind has."""
    responses = item["responses"]
    responses.pop("422", None)  # the framework's own validation, which no route uses
    for answer in responses.values():
        if "content" in answer:
            answer["content"] = {kind: body for kind, body in answer["content"].items() if body.get("schema")}
    if path in _OPEN:
        item["security"] = []
        return
    statuses = [429, 500] + ([401] if with_keys else [])
    if path.startswith("/v1/"):
        statuses += [503, 504]
    if "requestBody" in item:
        statuses += [413, 415]
    places = {parameter["in"] for parameter in item.get("parameters", ())}
    statuses += [400, 404] if places or "requestBody" in item else []
    for status in sorted(statuses):
        responses.setdefault(str(status), _error_reference(status))


def _error_reference(status: int) -> dict[str, str]:
    return {"$ref": f"#/components/responses/{_name(status)}"}


def _error_response(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": reference(ErrorBody), "example": error_body(_ERRORS[status])}}
    response: dict[str, Any] = {"description": _phrase(status), "content": content}
    return response | ({"headers": deepcopy(_RETRY_AFTER)} if status in (429, 503) else {})


def _examples(examples: Mapping[str, Any] | None) -> dict[str, Any]:
    if not examples:
        return {}
    named = {text.lower().replace(" ", "-"): {"summary": text, "value": value} for text, value in examples.items()}
    return {"examples": named}


def _name(status: int) -> str:
    return _phrase(status).title().replace(" ", "").replace("-", "")


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase
