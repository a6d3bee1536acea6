"""What the client raises: one class per kind of failure, all of them LookonceError.

LookonceError
├── ApiError                      the gateway refused: status, code, param, request_id
│   ├── BadRequestError           400, 413 and other 4xx
│   │   ├── ImageError            no usable image, or too large
│   │   └── ContextLengthError    prompt and answer don't fit into the model's context
│   ├── AuthenticationError       401
│   ├── PermissionDeniedError     403
│   ├── NotFoundError             404
│   ├── ConflictError             409
│   ├── RateLimitError            429: too many requests, or the services are full
│   └── ServerError               5xx
│       └── UnavailableError      503: a service is down or starting
├── ConnectionFailed              no gateway there, or the connection broke before an answer
│   └── RequestTimeout            no answer in time
└── StreamInterrupted             the connection broke after the answer began
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lookonce.core.errors import ErrorKind, LookonceError

if TYPE_CHECKING:
    from lookonce.client.response_types import Answer

_CODES = {
    ErrorKind.INVALID_ARGUMENT: "invalid_value",
    ErrorKind.UNSUPPORTED: "unsupported_value",
    ErrorKind.IMAGE_INVALID: "invalid_image",
    ErrorKind.UNAUTHENTICATED: "invalid_api_key",
    ErrorKind.RATE_LIMITED: "rate_limit_exceeded",
    ErrorKind.INTERNAL: "internal_error",
}
KIND_OF_CODE = {_CODES.get(kind, str(kind)): kind for kind in ErrorKind} | {
    "unknown_parameter": ErrorKind.INVALID_ARGUMENT
}
"""The API's error codes."""


class ApiError(LookonceError):
    """The gateway answered with an error.

    `status` is the HTTP status, None for one answer of many that failed (the request as a whole had 200); `code` is
    the API's word; `param` names the field at fault; `request_id` finds the request in the gateway's log.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: ErrorKind,
        status: int | None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(kind, message, param=param, retry_after=retry_after)
        self.status = status
        self.code = code
        self.request_id = request_id

    def __str__(self) -> str:
        facts = [str(fact) for fact in (self.status, self.code) if fact is not None]
        facts += [f"param {self.param}"] if self.param else []
        facts += [f"request {self.request_id}"] if self.request_id else []
        return f"{self.message} ({', '.join(facts)})" if facts else self.message


class BadRequestError(ApiError):
    """The request can't succeed as it stands (400, 413 and other 4xx)."""


class ImageError(BadRequestError):
    """The file is no usable image, or has too many pixels."""


class ContextLengthError(BadRequestError):
    """Prompt and answer together exceed the model's context."""


class AuthenticationError(ApiError):
    """The gateway wants an API key, or another one (401)."""


class PermissionDeniedError(ApiError):
    """The key may not do this (403)."""


class NotFoundError(ApiError):
    """No such image, model or route (404)."""


class ConflictError(ApiError):
    """The state of the resource doesn't allow it (409)."""


class RateLimitError(ApiError):
    """Too many requests, or the services are full (429). `retry_after` is in seconds."""


class ServerError(ApiError):
    """The gateway failed (5xx)."""


class UnavailableError(ServerError):
    """A service is down or starting (503). `retry_after` is in seconds."""


class ConnectionFailed(LookonceError):
    """No gateway could be reached at that URL, or the connection broke before an answer."""

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.UNAVAILABLE, *, unsent: bool = False) -> None:
        super().__init__(kind, message)
        self.unsent = unsent  # nothing of the request left this machine


class RequestTimeout(ConnectionFailed):
    """No answer within the client's timeout."""

    def __init__(self, message: str, *, unsent: bool = False) -> None:
        super().__init__(message, ErrorKind.DEADLINE_EXCEEDED, unsent=unsent)


class StreamInterrupted(LookonceError):
    """The connection broke, or the gateway failed, after the answer had begun: never retried by itself.

    `text` is what had arrived of a streamed answer; `answers` are those of `ask_many` that were complete.
    """

    def __init__(self, message: str, *, text: str = "", answers: Sequence[Answer] = ()) -> None:
        super().__init__(ErrorKind.UNAVAILABLE, message)
        self.text = text
        self.answers = list(answers)


_BY_KIND: dict[ErrorKind, type[ApiError]] = {
    ErrorKind.IMAGE_INVALID: ImageError,
    ErrorKind.IMAGE_TOO_LARGE: ImageError,
    ErrorKind.CONTEXT_LENGTH_EXCEEDED: ContextLengthError,
    ErrorKind.UNAUTHENTICATED: AuthenticationError,
    ErrorKind.PERMISSION_DENIED: PermissionDeniedError,
    ErrorKind.NOT_FOUND: NotFoundError,
    ErrorKind.CONFLICT: ConflictError,
    ErrorKind.RATE_LIMITED: RateLimitError,
    ErrorKind.OVERLOADED: RateLimitError,
    ErrorKind.UNAVAILABLE: UnavailableError,
    ErrorKind.EMBEDDING_MISSING: UnavailableError,
    ErrorKind.EMBEDDING_INVALID: UnavailableError,
    ErrorKind.FINGERPRINT_MISMATCH: UnavailableError,
    ErrorKind.CHECKPOINT_INVALID: ServerError,
    ErrorKind.DEADLINE_EXCEEDED: ServerError,
    ErrorKind.INTERNAL: ServerError,
}
_KIND_OF_STATUS = {
    401: ErrorKind.UNAUTHENTICATED,
    403: ErrorKind.PERMISSION_DENIED,
    404: ErrorKind.NOT_FOUND,
    409: ErrorKind.CONFLICT,
    413: ErrorKind.PAYLOAD_TOO_LARGE,
    429: ErrorKind.RATE_LIMITED,
    502: ErrorKind.UNAVAILABLE,
    503: ErrorKind.UNAVAILABLE,
    504: ErrorKind.DEADLINE_EXCEEDED,
}


def api_error(
    error: Any, *, status: int | None = None, request_id: str | None = None, retry_after: float | None = None
) -> ApiError:
    """The exception of the API's `error` object; of the status alone where there is none (a proxy answered)."""
    fields: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    code = fields.get("code")
    message = str(fields.get("message") or f"HTTP {status} without an explanation: is this a lookonce gateway?")
    kind = KIND_OF_CODE.get(str(code)) or _kind_of_status(status)
    return _BY_KIND.get(kind, BadRequestError)(
        message,
        kind=kind,
        status=status,
        code=code,
        param=fields.get("param"),
        request_id=request_id,
        retry_after=retry_after,
    )


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """The exception of an HTTP answer that is an error."""
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    error = content.get("error") if isinstance(content, dict) else None
    return api_error(
        error, status=status, request_id=headers.get("x-request-id"), retry_after=_seconds(headers.get("retry-after"))
    )


def _kind_of_status(status: int | None) -> ErrorKind:
    if status is None or status >= 500:
        return _KIND_OF_STATUS.get(status or 0, ErrorKind.INTERNAL)
    return _KIND_OF_STATUS.get(status, ErrorKind.INVALID_ARGUMENT)


def _seconds(value: str | None) -> float | None:
    return float(value) if value is not None and value.isascii() and value.isdigit() else None
