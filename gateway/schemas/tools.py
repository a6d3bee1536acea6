"""Functions that an answer may want called, as OpenAI's API says them; and the wire form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import Discriminator, Field, Tag

from gateway.schemas.body import Body, by_field
from gateway.schemas.structure import JsonSchema
from protos.lookonce.v1 import language_pb2

FunctionName = Annotated[str, Field(min_length=1, max_length=128)]
CallId = Annotated[str, Field(max_length=256)]


class Function(Body):
    """A function. Arguments are held to `parameters` whether or not `strict` is said."""

    name: FunctionName
    description: Annotated[str, Field(max_length=100_000)] | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class FunctionTool(Body):
    """A tool that the caller runs."""

    type: Literal["function"]
    function: Function


Tool = Annotated[
    Annotated[FunctionTool, Tag("(function)")],
    by_field("type", "function", others="other tools are not supported"),
]


class NamedFunction(Body):
    """Which function."""

    name: FunctionName


class NamedTool(Body):
    """The one function to be called."""

    type: Literal["function"]
    function: NamedFunction


def _word_or_object(value: Any) -> str:
    return "(text)" if isinstance(value, str) else "(object)"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(text)")] | Annotated[NamedTool, Tag("(object)")],
    Discriminator(_word_or_object),
]


class ToolFields(Body):
    """Of a request."""

    tools: Annotated[list[Tool] | None, Field(max_length=128)] = None
    tool_choice: Annotated[ToolChoice | None, Field(description='"auto" where there are tools')] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="false: at most one call")] = None


class CalledFunction(Body):
    """What was to be called, and how."""

    name: FunctionName
    arguments: Annotated[str, Field(description="a JSON object")]


class CalledTool(Body):
    """A call of an earlier answer."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction


def tools_of(body: ToolFields) -> language_pb2.Tools | None:
    """The wire form; None without tools."""
    if not body.tools:
        return None
    functions = [
        orjson.dumps(tool.function.model_dump(exclude_none=True, exclude={"strict"})).decode() for tool in body.tools
    ]
    wanted = body.tool_choice or "auto"
    named = wanted.function.name if isinstance(wanted, NamedTool) else ""
    choice = "REQUIRED" if isinstance(wanted, NamedTool) else wanted.upper()
    return language_pb2.Tools(functions=functions, choice=choice, named=named, single=body.parallel_tool_calls is False)
