"""Values as strict models, and errors that name the field in our own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from gateway.http.error_bodies import error_response, internal_error
from gateway.schemas.body import MEMBER, UNKNOWN
from lookonce.core.errors import ErrorKind, LookonceError, invalid

M = TypeVar("M", bound=BaseModel)
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


async def on_query_error(request: Request, error: Exception) -> Response:
    """Exception handler of what FastAPI finds in a query."""
    if not isinstance(error, RequestValidationError):
        return internal_error()
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
