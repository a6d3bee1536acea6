"""Functions that an answer may want called: checked, and the grammar that holds its calls to their schemas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_service.engine.grammar import Kind, Structure, settled
from lookonce.core.errors import invalid
from lookonce.models.chat.chat_format import CALL_BEGIN, CALL_END
from protos.lookonce.v1 import language_pb2

MAX_FUNCTIONS = 128
MAX_NAME = 128
_TEXT = "TEXT: /(.|\\n)*/"
_NOTHING = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tools:
    """What a request says of functions."""

    functions: tuple[str, ...]  # JSON objects, as the prompt tells of them
    grammar: Structure | None  # of the answer; None: no call is wanted


def tools_of(wanted: language_pb2.Tools, structure: Structure | None) -> Tools:
    """`structure` is the form of an answer without calls: JSON, or any text (None). Raises INVALID_ARGUMENT."""
    if len(wanted.functions) > MAX_FUNCTIONS:
        raise invalid(f"tools may hold {MAX_FUNCTIONS} functions, got {len(wanted.functions)}", param="tools")
    functions = [_function(text, number) for number, text in enumerate(wanted.functions)]
    names = [function["name"] for function in functions]
    if len(set(names)) != len(names):
        raise invalid("tools: the names of the functions must differ", param="tools")
    if wanted.named and wanted.named not in names:
        raise invalid(f"tool_choice names {wanted.named[:MAX_NAME]!r}, which is none of the tools", param="tool_choice")
    if structure is not None and structure.kind is not Kind.JSON_SCHEMA:
        raise invalid("beside tools an answer may be held to JSON only", param="tools")
    grammar = None
    if functions and wanted.choice != language_pb2.Tools.NONE:
        callable_ = [each for each in functions if not wanted.named or each["name"] == wanted.named]
        grammar = Structure(Kind.TOOLS, _grammar(callable_, wanted, structure))
    return Tools(tuple(wanted.functions), grammar)


def _function(text: str, number: int) -> dict[str, Any]:
    where = f"tools.{number}.function"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{where} is not JSON", param=where) from error
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise invalid(f"{where}.name must have 1 to {MAX_NAME} characters", param=f"{where}.name")
    found["parameters"] = settled(found.get("parameters", _NOTHING), f"{where}.parameters")
    return dict(found)


def _grammar(functions: Sequence[dict[str, Any]], wanted: language_pb2.Tools, structure: Structure | None) -> str:
    """In Lark's notation. A call begins in free text as soon as its tag is written: then it is one."""
    bodies = [
        f"call_{number}: {json.dumps(_head(function))} %json {json.dumps(function['parameters'])} {json.dumps('}')}"
        for number, function in enumerate(functions)
    ]
    either = " | ".join(f"call_{number}" for number in range(len(functions)))
    begin, end = json.dumps(CALL_BEGIN), json.dumps(CALL_END)
    call = f"call: {begin} body {end}"
    if wanted.choice == language_pb2.Tools.REQUIRED:
        start = "start: call" if wanted.single or wanted.named else 'start: call ("\\n" call)*'
        return "\n".join([start, call, f"body: {either}", *bodies])
    if structure is not None:
        answer = f"answer: %json {json.dumps(settled(json.loads(structure.source), 'response_format'))}"
        start = "start: call | answer" if wanted.single else 'start: call ("\\n" call)* | answer'
        return "\n".join([start, answer, call, f"body: {either}", *bodies])
    tag, rest = json.dumps(CALL_BEGIN.rstrip()), json.dumps("\n")
    start = "start: spoken | text" if wanted.single else "start: spoken* text"
    spoken = [f"begun[lazy]: TEXT {tag}", f"spoken: begun {rest} body {end}", "text: TEXT", _TEXT]
    return "\n".join([start, *spoken, f"body: {either}", *bodies])


def _head(function: dict[str, Any]) -> str:
    return f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
