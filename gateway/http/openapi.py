"""The OpenAPI document: FastAPI's own, and what it can't know: the errors that all routes share, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_fields_from_routes
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.http import examples
from gateway.http.error_bodies import HttpRefusal, error_body
from gateway.http.middleware import OPEN_PATHS
from gateway.schemas.body import Body
from gateway.schemas.requests import ImageUpload
from gateway.schemas.responses import Answered, ChatCompletionChunk, ErrorBody, MessageEvent, ResponseEvent
from gateway.schemas.systemone import SystemOneRequest
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.version import __version__

ABOUT: dict[str, Any] = {
    "title": "lookonce",
    "version": __version__,
    "description": "Look at an image once, ask many questions about it. OpenAI's API, and images as a resource.",
    "openapi_tags": [
        {"name": "images", "description": "Uploaded once, encoded once, asked about often, erased everywhere."},
        {"name": "chat", "description": "OpenAI's chat completions."},
        {"name": "embeddings", "description": "Vectors of texts and images: OpenAI's embeddings, rerank, search."},
        {"name": "moderations", "description": "OpenAI's moderations, by the categories of the operator's policy."},
        {"name": "files", "description": "OpenAI's files: what batches read and write."},
        {"name": "batches", "description": "OpenAI's batches: many requests, answered in the background."},
        {"name": "models", "description": "What is served."},
        {"name": "operation", "description": "For those who run it."},
    ],
    "separate_input_output_schemas": False,
}
"""Arguments of FastAPI."""
_TEMPLATE = "#/components/schemas/{model}"
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
_UNREFERENCED = (ErrorBody, ImageUpload, ChatCompletionChunk, ResponseEvent, MessageEvent, SystemOneRequest)
"""Models that no route takes or returns as such."""


def operation_id(route: APIRoute) -> str:
    """`ask_questions` becomes `askQuestions`."""
    first, *others = route.name.split("_")
    return first + "".join(word.capitalize() for word in others)


def reference(model: type[BaseModel]) -> dict[str, str]:
    """A reference to the schema of `model`."""
    return {"$ref": _TEMPLATE.format(model=model.__name__)}


def upload_body(fields: Mapping[str, Any], *required: str, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route that takes a form of a file and these fields, or `model` as JSON."""
    form = {
        "type": "object",
        "properties": {"file": {"type": "string", "format": "binary"}, **fields},
        "required": ["file", *required],
        "additionalProperties": False,
    }
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if model is not None:
        content["application/json"] = {"schema": reference(model)}
    return {"requestBody": {"required": True, "content": content}}


def or_events(event: type[BaseModel], *items: dict[str, Any], named: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may answer with server-sent events, each an `event`, such as `items`."""
    ending = "each is named by its type" if named else "the last is `data: [DONE]`"
    text = f"Server-sent events, each the JSON of a {event.__name__}; {ending}."
    # No type: some readers hold the schema against the whole text, others against each event taken apart.
    stream = {"description": text, "x-event": reference(event)}
    return {
        200: {"content": {"text/event-stream": {"schema": stream, "example": examples.events(*items, named=named)}}}
    }


def or_lines(line: type[BaseModel], *items: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may answer with lines of JSON, each a `line`, such as `items`."""
    stream = {"description": f"Lines, each the JSON of a {line.__name__}.", "x-event": reference(line)}
    example = b"\n".join(map(orjson.dumps, items)).decode()
    return {200: {"content": {"application/x-ndjson": {"schema": stream, "example": example}}}}


def complete(app: FastAPI, *, with_keys: bool) -> None:
    """Make `app` answer /openapi.json with the complete document."""
    generate = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate(), _models(app), with_keys=with_keys)
        return generate()

    app.openapi = document  # type: ignore[method-assign]


def _models(app: FastAPI) -> list[type[BaseModel]]:
    """All that routes take and return."""
    types = [field.field_info.annotation for field in get_fields_from_routes(app.routes)]
    found = [model for model in types if isinstance(model, type) and issubclass(model, Body | Answered)]
    return [*dict.fromkeys(found), *_UNREFERENCED]


def _complete(schema: dict[str, Any], models: Sequence[type[BaseModel]], *, with_keys: bool) -> None:
    components = schema["components"]
    # Once more: FastAPI's have lost nulls, and large numbers their last digits.
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_TEMPLATE)
    components["schemas"] = {name: _overlapping(model) for name, model in sorted(definitions["$defs"].items())}
    components["responses"] = {_name(status): _error_response(status) for status in _ERRORS}
    for path, operations in schema["paths"].items():
        for item in operations.values():
            _complete_operation(path, item, with_keys=with_keys)
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]


def _overlapping(schema: Any) -> Any:
    """The schema with unions as they are: which form is meant is told by looking, and others may fit as well."""
    if isinstance(schema, dict):
        return {
            "anyOf" if name == "oneOf" and isinstance(value, list) else name: _overlapping(value)
            for name, value in schema.items()
        }
    return [_overlapping(item) for item in schema] if isinstance(schema, list) else schema


def _complete_operation(path: str, item: dict[str, Any], *, with_keys: bool) -> None:
    responses = item["responses"]
    responses.pop("422", None)  # what FastAPI finds is a 400 here
    json = "application/json"
    for status, answer in responses.items():
        if answer["description"] == "Successful Response":
            answer["description"] = _phrase(int(status))
        if json in answer.get("content", {}):
            answer["content"][json]["example"] = examples.ANSWERS[item["operationId"]]
    body = item.get("requestBody", {"content": {}})["content"].get(json)
    if body is not None:
        given = examples.BODIES[item["operationId"]]
        body["examples"] = {
            text.lower().replace(" ", "-"): {"summary": text, "value": value} for text, value in given.items()
        }
    if path in OPEN_PATHS:
        item["security"] = []
        return
    statuses = {429, 500, *(int(status) for status in responses if int(status) >= 400)}
    statuses |= {401} if with_keys else set()
    statuses |= {503, 504} if path.startswith("/v1/") else set()
    statuses |= {413, 415} if "requestBody" in item else set()
    statuses |= {400, 404} if "requestBody" in item or item.get("parameters") else set()
    responses |= {str(status): {"$ref": f"#/components/responses/{_name(status)}"} for status in sorted(statuses)}


def _error_response(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": reference(ErrorBody), "example": error_body(_ERRORS[status])}}
    response: dict[str, Any] = {"description": _phrase(status), "content": content}
    if status in (429, 503):
        schema = {"description": "seconds to wait", "required": True, "schema": {"type": "string"}}
        response["headers"] = {"retry-after": schema}
    return response


def _name(status: int) -> str:
    return _phrase(status).title().replace(" ", "").replace("-", "")


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase
