"""Lines of a batch: how a request is written in its input, and how its fate is written in its output."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.json_text import JsonLimits, LongString, parse_json
from lookonce.core.errors import LookonceError

BOM = b"\xef\xbb\xbf"
"""What some editors begin a file with; where files were put together it stands in the middle."""
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
    """What is wrong with a file or a line, in OpenAI's form."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None
    custom_id: str | None = None  # of the line, if it can be told

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's batch error object."""
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


def parse(raw: bytes, number: int, limits: JsonLimits) -> Line | Problem:
    """A line as a request, as far as can be told without its endpoint."""
    try:
        value = parse_json(raw, limits, "the line").value
    except LookonceError as error:
        return Problem("invalid_json_line", error.message, number)
    if not isinstance(value, dict):
        return Problem("invalid_json_line", "the line must be a JSON object", number)
    custom_id = value.get("custom_id")
    known = isinstance(custom_id, str) and 1 <= len(custom_id) <= MAX_CUSTOM_ID
    found = _fault(value, known=known)
    if found is not None:
        code, text, param = found
        return Problem(code, text, number, param, custom_id if known else None)
    return Line(number, value["custom_id"], value["url"], value["body"])


def _fault(value: dict[str, Any], *, known: bool) -> tuple[str, str, str] | None:
    """What is wrong with a line's fields: code, text and the field. `known`: its custom_id is one."""
    for name in _FIELDS:
        if name not in value:
            return "missing_required_parameter", f"'{name}' is required", name
    unknown = next((name for name in value if name not in _FIELDS), None)
    if unknown is not None:
        return "unknown_parameter", f"unknown field '{unknown[:100]}'", unknown[:100]
    if not known:
        text = f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID} characters"
        return "invalid_custom_id", text, "custom_id"
    if value["method"] != "POST":
        return "invalid_method", "'method' must be POST", "method"
    if not isinstance(value["url"], str):
        return "invalid_url", "'url' must be a string", "url"
    if not isinstance(value["body"], dict):
        return "invalid_body", "'body' must be an object", "body"
    return None


def more_usage(usage: dict[str, Any] | None, reply: Reply) -> dict[str, Any]:
    """OpenAI's usage of a batch, with one answer more. Errors and moderations cost no tokens that are told."""
    found = [item.get("usage") or {} for item in (reply.body, *reply.body.get("answers", ()))]
    prompt = sum(item.get("prompt_tokens", 0) for item in found)
    cached = sum(item.get("prompt_tokens_details", {}).get("cached_tokens", 0) for item in found)
    completion = sum(item.get("completion_tokens", 0) for item in found)
    if usage is not None:
        prompt += usage["input_tokens"]
        cached += usage["input_tokens_details"]["cached_tokens"]
        completion += usage["output_tokens"]
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }


def answered(line: Line, reply: Reply) -> bytes:
    """The line of the output or error file."""
    response = {"status_code": reply.status, "request_id": "req_" + secrets.token_hex(12), "body": reply.body}
    return _dump(line.custom_id, response, None)


def unanswered(custom_id: str, code: str, message: str) -> bytes:
    """The line of the error file for a request that was never answered."""
    return _dump(custom_id, None, {"code": code, "message": message})


def refused(problem: Problem) -> bytes:
    """The line of the error file for a line of the input that is no request."""
    return _dump(problem.custom_id, None, problem.to_openai())


def _dump(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    fields = {"id": "batch_req_" + secrets.token_hex(12), "custom_id": custom_id, "response": response, "error": error}
    return orjson.dumps(fields) + b"\n"
