"""Lines of a batch: how a request is written in its input, and how its fate is written in its output."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.json_text import JsonLimits, LongString, parse_json
from lookonce.errors import LookonceError

DEFAULT_LIMITS = JsonLimits()
MAX_CUSTOM_ID = 512
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Line:
    """One request. `number` counts the lines of the input from 1."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]
    size: int = 0  # bytes of it all as JSON
    long: Mapping[str, LongString] = field(default_factory=dict)  # long strings in the body, by their names there


@dataclass(frozen=True)
class Reply:
    """What a request was answered: an HTTP status and a JSON object."""

    status: int
    body: dict[str, Any]

    @property
    def good(self) -> bool:
        """Whether it belongs in the output file, not in the error file."""
        return self.status == 200


@dataclass(frozen=True)
class Problem:
    """Why a batch can't begin, in OpenAI's form."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's batch error object."""
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


def parse(raw: bytes, number: int, limits: JsonLimits = DEFAULT_LIMITS) -> Line | Problem:
    """A line as a request, as far as can be told without its endpoint."""
    try:
        value = parse_json(raw, limits, "the line").value
    except LookonceError as error:
        return Problem("invalid_json_line", error.message, number)
    if not isinstance(value, dict):
        return Problem("invalid_json_line", "the line must be a JSON object", number)
    for name in _FIELDS:
        if name not in value:
            return Problem("missing_required_parameter", f"'{name}' is required", number, name)
    unknown = next((name for name in value if name not in _FIELDS), None)
    if unknown is not None:
        return Problem("unknown_parameter", f"unknown field '{unknown[:100]}'", number, unknown[:100])
    custom_id, url, body = value["custom_id"], value["url"], value["body"]
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        text = f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID} characters"
        return Problem("invalid_custom_id", text, number, "custom_id")
    if value["method"] != "POST":
        return Problem("invalid_method", "'method' must be POST", number, "method")
    if not isinstance(url, str):
        return Problem("invalid_url", "'url' must be a string", number, "url")
    if not isinstance(body, dict):
        return Problem("invalid_body", "'body' must be an object", number, "body")
    return Line(number, custom_id, url, body)


def tokens(reply: Reply) -> tuple[int, int, int]:
    """What a request cost: tokens of the prompt, those of them that were cached, and those of the answer. Errors and
    moderations cost none that are told."""
    found = [item.get("usage") or {} for item in (reply.body, *reply.body.get("answers", ()))]
    prompt = sum(usage.get("prompt_tokens", 0) for usage in found)
    cached = sum(usage.get("prompt_tokens_details", {}).get("cached_tokens", 0) for usage in found)
    return prompt, cached, sum(usage.get("completion_tokens", 0) for usage in found)


def written(line: Line, reply: Reply) -> bytes:
    """The line of the output or error file."""
    response = {"status_code": reply.status, "request_id": "req_" + secrets.token_hex(12), "body": reply.body}
    return _dump(line.custom_id, response, None)


def unanswered(custom_id: str, code: str, message: str) -> bytes:
    """The line of the error file for a request that was never answered."""
    return _dump(custom_id, None, {"code": code, "message": message})


def _dump(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    fields = {"id": "batch_req_" + secrets.token_hex(12), "custom_id": custom_id, "response": response, "error": error}
    return orjson.dumps(fields) + b"\n"
