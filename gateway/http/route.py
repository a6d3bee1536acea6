"""What routes share: a body that is read our way before FastAPI hands it on as its model, errors that name the field at
fault, work that stops when its client goes away, pages of lists, and whose request it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import orjson
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from gateway.auth import Tenant
from gateway.conversation import Caller
from gateway.core import Gateway
from gateway.http.error_bodies import HttpRefusal, error_response
from gateway.json_text import LONG_STRINGS, JsonLimits, LongString, parse_json
from gateway.metrics import DISCONNECTS
from gateway.schemas.body import MEMBER, UNKNOWN
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.tasks import end_tasks, start_task

SMALL = 1 << 15
"""Bytes that are worked on in the event loop."""
P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="bodies")  # one, so that it takes turns with the loop alone
_MAX_NAME = 100
_TEXTS = {
    "missing": "{field} is required",
    "extra_forbidden": "unknown {what} {field}",
    "string_type": "{field} must be a string",
    "int_type": "{field} must be a whole number",
    "float_type": "{field} must be a number",
    "bool_type": "{field} must be true or false",
    "list_type": "{field} must be a list",
    "dict_type": "{field} must be an object",
    "model_type": "{field} must be an object",
    "greater_than": "{field} must be greater than {gt}",
    "greater_than_equal": "{field} must be at least {ge}",
    "less_than": "{field} must be less than {lt}",
    "less_than_equal": "{field} must be at most {le}",
    "finite_number": "{field} must be a finite number",
    "string_too_short": "{field} must have at least {min_length} characters",
    "string_too_long": "{field} must have at most {max_length} characters",
    "too_short": "{field} must have at least {min_length} items",
    "too_long": "{field} must have at most {max_length} items",
    "literal_error": "{field} must be one of {expected}",
    MEMBER: "{field} {text}",
}
_UNIONS = {
    ("(text)", "string_type"): "{field} must be a string or a list",
    ("(object)", "model_type"): "{field} must be a string or an object",
}
"""The same for fields of two forms, by the tag of the one that was tried (see gateway.schemas.body)."""
_TELLING = {"unsupported": 0, "extra_forbidden": 1}


class Route(APIRoute):
    """FastAPI's, but for the reading of a JSON body: within the gateway's limits, large ones off the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]

        async def read_first(request: Request) -> Response:
            return await handle(_Read(request, await read_json(request, model)))

        return read_first


class _Read(Request):
    """A request whose body has been read."""

    def __init__(self, request: Request, value: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        """FastAPI asks whether there is one."""
        return b"{}"

    async def json(self) -> BaseModel:
        """The body as its model, which FastAPI takes as it is."""
        return self._value


async def read_json(request: Request, model: type[M]) -> M:
    """The body as `model`, long strings in it in LONG_STRINGS. Raises INVALID_ARGUMENT naming the first field at fault,
    and 415 for what doesn't say that it is JSON: a page of any site could send that."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        text = "send JSON with the header 'content-type: application/json'"
        raise HttpRefusal(415, "unsupported_media_type", text, param="content-type")
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
    limits = gateway_of(request).settings.json_limits
    value, long = await aside(len(raw), _read, raw, model, limits)
    LONG_STRINGS.set(long)
    return value


def _read(raw: bytearray, model: type[M], limits: JsonLimits) -> tuple[M, Mapping[str, LongString]]:
    parsed = parse_json(raw, limits)
    return validate(parsed.value, model), parsed.long


class UnknownField(LookonceError):
    """A field nobody knows; has OpenAI's own code."""

    code = "unknown_parameter"

    def __init__(self, message: str, param: str) -> None:
        super().__init__(ErrorKind.INVALID_ARGUMENT, message, param=param)


def validate(value: Any, model: type[M]) -> M:
    """`value` as `model`. Raises INVALID_ARGUMENT naming the first field at fault."""
    if not isinstance(value, dict):
        raise invalid("the request body must be a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False, include_input=False), value) from error


async def on_query_error(request: Request, error: RequestValidationError) -> Response:
    """Exception handler of what FastAPI finds in a query."""
    problems = [problem | {"loc": problem["loc"][1:]} for problem in error.errors()]
    return error_response(_explained(problems, dict(request.query_params), "query parameter"))


def _explained(problems: Sequence[Any], value: Any, what: str = "field") -> LookonceError:
    """Our words for the first problem; those that say what is not supported come first, then unknown fields, as the
    likeliest cause of the others."""
    first = min(problems, key=lambda item: _TELLING.get(item["type"], len(_TELLING)))
    kind, context = first["type"], first.get("ctx", {})
    param, found = _path(first["loc"], value)
    if kind.startswith(UNKNOWN):
        member, kind = kind.removeprefix(UNKNOWN), MEMBER if isinstance(found, dict) else "model_type"
        param = f"{param}.{member}" if isinstance(found, dict) else param
        context = {"text": first["msg"]}
    field = f"'{param}'" if param else "the request body"
    if kind == "value_error":  # raised by our own validators
        return invalid(f"{field}: {context['error']}", param=param)
    if kind == "unsupported":  # see gateway.schemas.neutral
        text = f"{context['what']} not supported: {field} may be {context['allowed']}"
        return LookonceError(ErrorKind.UNSUPPORTED, text, param=param)
    text = _UNIONS.get((*first["loc"][-1:], kind)) or _TEXTS.get(kind, "{field} has a wrong type or value")
    message = text.format(**{**context, "field": field, "what": what})
    return UnknownField(message, param) if kind == "extra_forbidden" else invalid(message, param=param)


def _path(location: tuple[int | str, ...], value: Any) -> tuple[str, Any]:
    """The way to the field in the client's own JSON, and what is there. What pydantic adds to it is left out: the tags
    of unions' members (see gateway.schemas.body), and fields of another form than the client's."""
    names: list[str] = []
    current = value
    for position, step in enumerate(location):
        last = position == len(location) - 1
        if isinstance(step, str) and _is_tag(step) and not (last and isinstance(current, dict) and step in current):
            continue
        if isinstance(current, dict) and isinstance(step, str) and (last or step in current):
            names.append(step[:_MAX_NAME])
            current = current.get(step)
        elif isinstance(current, list) and isinstance(step, int) and step < len(current):
            names.append(str(step))
            current = current[step]
    return ".".join(names), current


def _is_tag(step: str) -> bool:
    return step.startswith("(") and step.endswith(")")


async def aside(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns for something of `size` bytes: worked on off the event loop unless it is small."""
    if size <= SMALL:
        return function(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_THREAD, lambda: function(*args, **kwargs))


class ClientGone(Exception):
    """The client closed the connection; nobody reads the answer."""


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away (ClientGone)."""
    task = start_task(work)
    gone = start_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        DISCONNECTS.inc()
        raise ClientGone
    finally:
        await end_tasks(task, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def whole(most: int) -> BeforeValidator:
    """For a query's whole number from 1 to `most`."""

    def check(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most:
            return int(text)
        raise PydanticCustomError(MEMBER, MEMBER, {"text": f"must be a whole number from 1 to {most}"})

    return BeforeValidator(check)


def list_object(items: Sequence[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": list(items), "first_id": first, "last_id": last, "has_more": more}


def json_response(content: Any, status: int = 200) -> Response:
    """A JSON answer that is ours already: FastAPI's validation of large ones would take time."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type="application/json")


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves the request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def tenant_of(request: Request) -> Tenant:
    """Who the presented key belongs to."""
    tenant: Tenant = request.state.tenant
    return tenant


def caller_of(request: Request, user: str | None = None) -> Caller:
    """For the core: tenant, a client for fairness (the tenant and OpenAI's `user`), and the time allowed."""
    tenant = tenant_of(request)
    return Caller(tenant, f"{tenant.name}/{user or ''}", gateway_of(request).settings.request_timeout)
