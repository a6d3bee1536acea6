"""Bodies of OpenAI's Responses API, and the conversation each is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gateway.schemas.body import Body, MaxTokens, Temperature, TopP, by_field, text_or_list, text_or_object
from gateway.schemas.neutral import Hint, Hints, Neutral
from gateway.schemas.requests import REFERENCE, ChatRequest, Detail, Text
from gateway.schemas.structure import JsonSchema, ObjectFormat, TextFormat
from gateway.schemas.tools import CallId, FunctionName

ResponseId = Annotated[str, Field(min_length=1, max_length=128)]


class InputText(Body):
    """Text, of the caller or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[Any, Neutral("annotations are", [])] = None
    logprobs: Any = None


class InputImage(Body):
    """An image by its URL (data:, https: or lookonce:), or by the id of one that is kept here."""

    type: Literal["input_image"]
    image_url: Text | None = None
    file_id: Text | None = None
    detail: Detail | None = None


InputPart = Annotated[
    Annotated[InputText, Tag("(input_text)")]
    | Annotated[InputText, Tag("(output_text)")]
    | Annotated[InputImage, Tag("(input_image)")],
    by_field("type", "input_text", "output_text", "input_image", others="audio and files are not supported"),
]
InputContent = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[InputPart], Tag("(list)")], Discriminator(text_or_list)
]


class InputMessage(Body):
    """A message, also one that an earlier response put out."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent
    id: Hint | None = None
    status: Hint | None = None
    phase: Hint | None = None


class InputCall(Body):
    """A call that an earlier response wanted made."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str
    id: Hint | None = None
    status: Hint | None = None
    namespace: Annotated[Any, Neutral("a namespace is")] = None


class InputCallOutput(Body):
    """What it returned."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: InputContent
    id: Hint | None = None
    status: Hint | None = None


def _item_kind(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else None
    return f"({kind})" if kind in ("message", "function_call", "function_call_output") else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[InputCall, Tag("(function_call)")]
    | Annotated[InputCallOutput, Tag("(function_call_output)")],
    Discriminator(
        _item_kind,
        custom_error_type="unknown type",
        custom_error_message="must be 'message', 'function_call' or 'function_call_output': others are not supported",
    ),
]


Items = Annotated[list[InputItem], Field(min_length=1, max_length=1024)]


class SchemaText(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: Annotated[JsonSchema, Field(alias="schema")]
    description: Annotated[str, Field(max_length=10_000)] | None = None
    strict: bool | None = None


TextForm = Annotated[
    Annotated[TextFormat, Tag("(text)")]
    | Annotated[ObjectFormat, Tag("(json_object)")]
    | Annotated[SchemaText, Tag("(json_schema)")],
    by_field("type", "text", "json_object", "json_schema", others="other forms are not supported"),
]


class TextOptions(Body):
    """The form of the answer."""

    format: TextForm | None = None
    verbosity: Annotated[Any, Neutral("another verbosity is", "medium")] = None


class ResponseTool(Body):
    """A function that the caller runs."""

    type: Literal["function"]
    name: FunctionName
    description: Annotated[str, Field(max_length=100_000)] | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


ResponseTools = Annotated[
    Annotated[ResponseTool, Tag("(function)")], by_field("type", "function", others="other tools are not supported")
]


class ChosenTool(Body):
    """The one function to be called."""

    type: Literal["function"]
    name: FunctionName


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(text)")] | Annotated[ChosenTool, Tag("(object)")],
    Discriminator(text_or_object),
]


class Reasoning(Body):
    """None is done here."""

    effort: Annotated[Any, Neutral("reasoning is", "none")] = None
    summary: Annotated[Any, Neutral("reasoning is", "auto")] = None
    generate_summary: Annotated[Any, Neutral("reasoning is", "auto")] = None


class ResponsesRequest(Body):
    """POST /v1/responses."""

    model: Annotated[str, Field(max_length=512)] | None = None
    input: Annotated[
        Annotated[Text, Tag("(text)")]
        | Annotated[list[InputItem], Field(min_length=1, max_length=1024), Tag("(list)")],
        Discriminator(text_or_list),
    ]
    instructions: str | None = None
    previous_response_id: ResponseId | None = None
    store: Annotated[bool | None, Field(description="keep it for a next turn (unless false)")] = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTools] | None, Field(max_length=128)] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ChosenTool | None, Field(union_mode="left_to_right")
    ] = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: Annotated[Any, Neutral("obfuscation is", {"include_obfuscation": False})] = None
    user: Hint | None = None
    safety_identifier: Hint | None = None
    metadata: Hints | None = None
    prompt_cache_key: Hint | None = None
    prompt_cache_retention: Hint | None = None
    include: Annotated[list[Hint] | None, Field(max_length=16)] = None
    truncation: Annotated[Any, Neutral("cutting the conversation is", "disabled")] = None
    reasoning: Reasoning | None = None
    background: Annotated[Any, Neutral("work in the background is", False)] = None
    conversation: Annotated[Any, Neutral("a stored conversation is")] = None
    service_tier: Annotated[Any, Neutral("another service tier is", "auto", "default")] = None
    top_logprobs: Annotated[Any, Neutral("logprobs of an answer's tokens are", 0)] = None
    prompt: Annotated[Any, Neutral("a stored prompt is")] = None
    max_tool_calls: Annotated[Any, Neutral("tools that run here are")] = None


def chat_of(body: ResponsesRequest, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The chat request it is; `before` are the messages of the response that it follows."""
    messages = [message for message in before if not (body.instructions and message["role"] == "system")]
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    asked = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else list(_messages(body.input))
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages + asked,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "response_format": _format(body.text.format if body.text is not None else None),
        "stream": body.stream,
    }
    if body.tools:
        functions = [tool.model_dump(exclude_none=True, exclude={"type"}) for tool in body.tools]
        fields["tools"] = [{"type": "function", "function": function} for function in functions]
        chosen: Any = body.tool_choice
        if isinstance(chosen, ChosenTool):
            chosen = {"type": "function", "function": {"name": chosen.name}}
        fields["tool_choice"] = chosen
        fields["parallel_tool_calls"] = body.parallel_tool_calls
    return {name: value for name, value in fields.items() if value is not None and name in ChatRequest.model_fields}


def _messages(items: Sequence[InputItem]) -> Iterator[dict[str, Any]]:
    """Calls that follow each other are one answer's."""
    calls: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, InputCall):
            function = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": function})
            continue
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}
            calls = []
        if isinstance(item, InputCallOutput):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
        elif item.role == "user":
            yield {"role": "user", "content": _content(item.content)}
        else:
            yield {"role": item.role, "content": _text(item.content)}
    if calls:
        yield {"role": "assistant", "content": None, "tool_calls": calls}


def _content(content: str | list[InputPart]) -> Any:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: InputPart) -> dict[str, Any]:
    if isinstance(part, InputText):
        return {"type": "text", "text": part.text}
    url = {"url": part.image_url or f"{REFERENCE}{part.file_id or ''}"}
    return {"type": "image_url", "image_url": url | ({"detail": part.detail} if part.detail else {})}


def _text(content: str | list[InputPart]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, InputText))


def _format(wanted: TextForm | None) -> dict[str, Any] | None:
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    if isinstance(wanted, ObjectFormat):
        return {"type": "json_object"}
    named = {"name": wanted.name, "schema": wanted.schema_}
    return {"type": "json_schema", "json_schema": named}
