"""The table from error kinds to HTTP, and the one shape that every error has (OpenAI's)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lookonce.core.errors import ErrorKind, LookonceError


@dataclass(frozen=True)
class HttpError:
    """How a kind looks over HTTP. `type` and `code` are OpenAI's words where it has one."""

    status: int
    type: str
    code: str


_REQUEST, _SERVER = "invalid_request_error", "server_error"
HTTP_ERRORS: dict[ErrorKind, HttpError] = {
    ErrorKind.INVALID_ARGUMENT: HttpError(400, _REQUEST, "invalid_value"),
    ErrorKind.UNSUPPORTED: HttpError(400, _REQUEST, "unsupported_value"),
    ErrorKind.IMAGE_INVALID: HttpError(400, _REQUEST, "invalid_image"),
    ErrorKind.IMAGE_TOO_LARGE: HttpError(400, _REQUEST, "image_too_large"),
    ErrorKind.PAYLOAD_TOO_LARGE: HttpError(413, _REQUEST, "payload_too_large"),
    ErrorKind.CONTEXT_LENGTH_EXCEEDED: HttpError(400, _REQUEST, "context_length_exceeded"),
    ErrorKind.UNAUTHENTICATED: HttpError(401, "authentication_error", "invalid_api_key"),
    ErrorKind.PERMISSION_DENIED: HttpError(403, "permission_error", "permission_denied"),
    ErrorKind.NOT_FOUND: HttpError(404, _REQUEST, "not_found"),
    ErrorKind.CONFLICT: HttpError(409, _REQUEST, "conflict"),
    ErrorKind.EMBEDDING_MISSING: HttpError(503, _SERVER, "embedding_missing"),
    ErrorKind.EMBEDDING_INVALID: HttpError(503, _SERVER, "embedding_invalid"),
    ErrorKind.FINGERPRINT_MISMATCH: HttpError(503, _SERVER, "fingerprint_mismatch"),
    ErrorKind.CHECKPOINT_INVALID: HttpError(500, _SERVER, "checkpoint_invalid"),
    ErrorKind.RATE_LIMITED: HttpError(429, "rate_limit_error", "rate_limit_exceeded"),
    ErrorKind.OVERLOADED: HttpError(429, "rate_limit_error", "overloaded"),
    ErrorKind.UNAVAILABLE: HttpError(503, _SERVER, "unavailable"),
    ErrorKind.DEADLINE_EXCEEDED: HttpError(504, "timeout_error", "deadline_exceeded"),
    ErrorKind.CANCELLED: HttpError(499, _REQUEST, "cancelled"),
    ErrorKind.INTERNAL: HttpError(500, _SERVER, "internal_error"),
}
CLIENT_GONE = 499
"""The status in metrics and logs of a request whose client left before it was answered."""


class HttpRefusal(LookonceError):
    """A refusal that only HTTP has a status for; the connection ends with it where `close`."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, close: bool = False) -> None:
        super().__init__(ErrorKind.INVALID_ARGUMENT, message, param=param)
        self.shape = HttpError(status, _REQUEST, code)
        self.close = close


_STATUS_TEXTS = {
    404: (HTTP_ERRORS[ErrorKind.NOT_FOUND], "no such route"),
    405: (HttpError(405, _REQUEST, "method_not_allowed"), "the route does not take this method"),
    413: (HTTP_ERRORS[ErrorKind.PAYLOAD_TOO_LARGE], "the request body is too large"),
    415: (HttpError(415, _REQUEST, "unsupported_media_type"), "the content type is not supported"),
}
_RETRY = frozenset({429, 503})
_IDS = ("img_", "file-", "batch_")


def shape_of(error: LookonceError) -> HttpError:
    """How the error looks over HTTP."""
    return error.shape if isinstance(error, HttpRefusal) else HTTP_ERRORS[error.kind]


def error_body(error: LookonceError) -> dict[str, Any]:
    """The JSON of an error: {"error": {"message", "type", "param", "code"}}."""
    shape = shape_of(error)
    code = getattr(error, "code", None) or shape.code
    return {"error": {"message": error.message, "type": shape.type, "param": error.param, "code": code}}


def error_response(error: LookonceError) -> Response:
    """The answer to a request that failed."""
    status = shape_of(error).status
    headers = {"connection": "close"} if isinstance(error, HttpRefusal) and error.close else {}
    if status in _RETRY:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after or 1.0)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return _json(status, error_body(error), headers)


def internal_error() -> Response:
    """The answer when something of ours broke: says nothing of it."""
    return error_response(LookonceError(ErrorKind.INTERNAL, "internal error"))


async def on_lookonce_error(request: Request, error: LookonceError) -> Response:
    """Exception handler of LookonceError."""
    return error_response(error)


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Exception handler of clients that left: nobody reads the answer; the access log does."""
    return Response(status_code=CLIENT_GONE)


async def on_http_exception(request: Request, error: HTTPException) -> Response:
    """Exception handler of what the framework raises (no route, wrong method, body too large): our texts."""
    status, headers = error.status_code, dict(error.headers or {})
    if status >= 500:
        return internal_error()
    if status == 405 and _is_made_up(request):
        status, headers = 404, {}
    shape, message = _STATUS_TEXTS.get(
        status, (HttpError(status, _REQUEST, "invalid_request"), "the request is malformed")
    )
    body = {"error": {"message": message, "type": shape.type, "param": None, "code": shape.code}}
    return _json(status, body, headers)


async def on_unforeseen(request: Request, error: Exception) -> Response:
    """Exception handler of everything else; RequestScope logs it."""
    return internal_error()


def _is_made_up(request: Request) -> bool:
    """Whether a path fits a route only because anything may stand for an id there."""
    given = request.path_params.values()
    return bool(given) and not any(str(value).startswith(_IDS) for value in given)


def _json(status: int, body: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")
